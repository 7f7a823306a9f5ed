"""OPSDC: On-Policy Self-Distillation for Reasoning Compression (arXiv 2603.05433), all of it in one file.

Told "be concise", a reasoning model reasons in fewer tokens. OPSDC teaches it to do so without being told: on
the prefixes it visits without the instruction, it learns its own next-token distribution with the
instruction. One model, two prompts; no answers, no rewards, no length budget.

    x        a problem                         y        the student's response, y_t its t-th token
    c        the conciseness instruction       V, d     vocabulary, hidden size
    student  p = pi_theta(. | x, y_<t)         gets the gradient
    teacher  q = pi_thetabar(. | x, c, y_<t)   the same network with older weights thetabar, no gradient

    for step = 1 .. steps:
        x_1..x_B ~ D                           # B = 32 problems, one rollout each
        y_i ~ pi_theta(. | x_i)                # vLLM, temperature 1, at most 8192 tokens; cut ones are kept
        loss = 1/B sum_i 1/|y_i| sum_t KL(p || q)      # y held fixed; exact over the vocabulary, in nats
        theta <- AdamW(theta, grad loss)       # lr 1e-6 constant, weight decay 0.01, gradient clipped at 1.0
        every M = 50 steps: thetabar <- theta  # the refresh

Every rank holds shards of theta, Adam's state (FSDP2, float32) and thetabar, and a vLLM engine in its process
(or part of one, --vllm_tp). A step copies theta into the engine in place and samples; swaps thetabar's shards
into the training module for a pass that keeps the last hidden states; swaps theta back, and trains it.
Axes: B sequences of a batch, b of a micro-batch, T positions, N response tokens packed end to end, V, d.

Left out on purpose: rewards and advantages, importance ratios (at a given prefix the loss is exact, whoever
sampled it), LoRA, schedules, several rollouts a prompt, asynchronous rollouts. README: forks that add them.

Other than in the authors' code (A) or the paper's text (P), here
 1. logits are float32 whatever the model's dtype: A's bfloat16 drowns the small KL (see THE OBJECTIVE);
 2. a token weighs 1 / (B |y|), as in P, however the batch is cut into micro-batches;
 3. the sampled ids are trained on: A tokenises their text again, and has "Remember ..." twice in a prompt;
 4. thetabar is in the checkpoint, so that --resume goes on as if the run had not stopped;
 5. the data's wrapper is taken off and put on (P keeps it), and problems with long prompts are dropped.
"""
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer,
                          HfArgumentParser)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.utils import cached_file

# The file beside this one reads problems and grades responses. A fork may bring an eval.py of its own.
# Python looks for it in this folder first, except when it is started as `python -P`.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import eval as evaluator
except ImportError as error:
    sys.exit(f"error: {os.path.abspath(__file__)} needs this project's eval.py beside it: {error}")

# ---------------------------------------------------------------------------------------------------- CONFIG
def setting(default, explanation):
    return field(default=default, metadata={"help": explanation})

@dataclass
class Config:
    """Every setting, once; the defaults are the paper's. --batch_size and --batch-size are the same flag."""
    model: str = setting("Qwen/Qwen3-8B", "hub id or folder of a causal language model with a chat template")
    data: str = setting("BytedTsinghua-SIA/DAPO-Math-17k", "hub ID[:CONFIG[:SPLIT]], file or folder of files")
    out: str = setting("out", "new folder: metrics.jsonl, samples.jsonl, config.json, checkpoint-K/, model/")
    instruction: str = setting("v1", "c: v1, v2, 20%%, 50%% or 80%% (fewer tokens), @FILE or the text itself")
    wrapper: Literal["math", "none"] = setting("math", "DAPO's around a problem; none: prompts as they are")
    steps: int = setting(100, "number of updates")
    batch_size: int = setting(32, "B: problems a step, one rollout each, over all ranks")
    lr: float = setting(1e-6, "AdamW's learning rate, constant")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    clip: float = setting(1.0, "largest norm of the gradient; 0 = no clipping")
    temperature: float = setting(1.0, "sampling temperature of the rollouts")
    max_prompt_tokens: int = setting(1024, "problems with a longer prompt are dropped")
    max_response_tokens: int = setting(8192, "rollouts are cut here, and trained on as they are")
    refresh_every: int = setting(50, "M: thetabar <- theta after so many steps; 0 = frozen teacher")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = setting("reverse_kl", "the others are ablations")
    keep: Literal["all", "correct"] = setting("all", "rollouts to train on; correct ones need known answers")
    micro_batch_tokens: int = setting(16384, "padded tokens of a forward pass: memory, not mathematics")
    loss_chunk: int = setting(1024 if torch.cuda.is_available() else 256, "tokens that have logits at a time")
    gradient_checkpointing: bool = setting(True, "recompute activations in backward: less memory, more time")
    vllm_tp: int = setting(1, "ranks that share one vLLM engine (tensor parallelism)")
    vllm_memory: float = setting(0.5, "share of each GPU's memory for vLLM while it generates")
    save_every: int = setting(10, "steps between checkpoints; the newest two are kept")
    export_every: int = setting(0, "steps between exports to model-K/ on the way; 0 = only at the end")
    resume: bool = setting(False, "go on from the newest whole checkpoint in --out")
    seed: int = setting(0, "of the order of the problems and of the sampling")
    thinking: bool = setting(True, "the chat template's enable_thinking (--no_thinking switches it off)")

# --------------------------------------------------------------------------------------------------- PROMPTS
# Both see the same problem; the teacher's prompt has the instruction where the student's says "Solve the
# following math problem step by step". The strings are the experiment.
FORMAT = ("The last line of your response should be of the form Answer: $Answer (without quotes) "
          "where $Answer is the answer to the problem.")
# What stands around the problem in every row of DAPO-Math-17k, and in the student's prompt
STUDENT_PREFIX = f"Solve the following math problem step by step. {FORMAT}\n\n"
TEACHER_PREFIX = f"{FORMAT}\n\n"  # after the instruction
SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'  # after the problem, in both
WRAPPERS = {"math": (STUDENT_PREFIX, SUFFIX), "none": ("", "")}  # the choices of --wrapper

INSTRUCTIONS = {  # versions 1 and 2 of the paper, word for word
    "v1": "Solve the following math problem concisely and correctly. Be direct: avoid unnecessary "
          "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
          "needed to reach the answer.",
    "v2": "Solve the following math problem concisely and correctly. Prioritize a correct final answer "
          "above brevity. For straightforward problems, be direct: avoid unnecessary elaboration, "
          "redundant steps, or restating the problem. For difficult or multi-step problems, do NOT "
          "over-compress: keep every reasoning step needed for correctness, including case analysis, edge "
          "cases, and a brief check of the final answer. Never omit a step that the answer depends on.",
} | {f"{p}%": f"Solve the following math problem correctly using {p}% fewer tokens than you normally would. "
              "Be more concise — cut unnecessary elaboration, redundant steps, and verbose explanations "
              "while preserving correctness." for p in (20, 50, 80)}

def prompt_ids(tokenizer, problem, instruction=None, thinking=True, wrapper="math", tools=None):
    """Ids of the student's prompt or, given c's text as `instruction`, of the teacher's. problem: a text, or
    messages, whose last user turn is wrapped. ValueError: the template fails."""
    prefix, suffix = WRAPPERS[wrapper]
    if instruction is not None:
        prefix = f"{instruction}\n\n{TEACHER_PREFIX}" if wrapper == "math" else f"{instruction}\n\n"
    messages = problem if isinstance(problem, list) else [{"role": "user", "content": problem}]
    messages = evaluator.edit_last_user(messages, lambda text: prefix + text + suffix)
    with evaluator.blaming(f"the model's chat template fails on {str(problem):.80}"):
        evaluator.check(not tools or "tools" in str(tokenizer.chat_template), "it has no place for tools")
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                             return_dict=False, tools=tools, enable_thinking=thinking)

# --------------------------------------------------------------------------------------------- THE OBJECTIVE
# loss = sum over tokens of w KL(p || q), w = 1 / (B |y|). With the student's logits s and a = log p - log q:
#     KL = sum_v p_v a_v                             dKL/ds_v = p_v (a_v - sum_u p_u a_u)
#        = sum_v p_v (a_v + exp(-a_v) - 1)           as sum_v p_v = sum_v q_v = sum_v p_v exp(-a_v) = 1
# The second sum is taken, whose terms are never negative: those of the first have both signs and cancel to
# second order, which in float32 leaves an error of 1.5e-4 of a KL of 1e-4 nats/token. Logits are float32 if
# hidden states and heads are bfloat16 too: at a KL of 0.0016 nats/token, bfloat16 logits put an error of 20 %
# on the loss and of 63 % on the head's gradient (README, The objective).

def kl_divergence(p, q, a):  # KL(p || q) [n] in nats, given a = log p - log q [n, V]
    near = torch.neg(a).expm1_().add_(a).mul_(p)  # p (expm1(-a) + a), in place: writing memory takes the time
    far = torch.sub(q, p).addcmul_(p, a)  # q - p + p a: the same where exp(-a) may overflow, worse near 0
    return torch.where(a > -1, near, far).sum(-1)  # any threshold from -80 to -1 would do

def divergence_and_gradient(p, log_p, q, log_q, kind):
    """[n, V] of student (p) and teacher (q) -> D [n] in nats and dD/ds [n, V], s the student's logits."""
    a = log_p - log_q
    if kind == "forward_kl":  # KL(q || p)
        return kl_divergence(q, p, -a), p - q
    if kind == "reverse_kl":
        value = kl_divergence(p, q, a)
    else:  # jsd: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2
        log_m, m = torch.logaddexp(log_p, log_q) - math.log(2), (p + q) / 2
        a = log_p - log_m
        value, a = (kl_divergence(p, m, a) + kl_divergence(q, m, log_q - log_m)) / 2, a / 2
    return value, p * (a - (p * a).sum(-1, keepdim=True))  # dD/dp_v is a_v up to a constant, which cancels

def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher) of each row, nats, float32: [N, V], [N, V] -> [N]. For tests and forks."""
    log_p, log_q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return divergence_and_gradient(log_p.exp(), log_p, log_q.exp(), log_q, "reverse_kl")[0]

class ChunkedDivergence(torch.autograd.Function):
    """Loss and both gradients in one sweep over N. Logits exist for `chunk` tokens at a time and become their
    own gradient in place; the head's gradient adds up on the way."""
    BLOCK = dict(cpu=620_000, cuda=10_000_000)  # logits of one softmax: in a CPU's cache, or filling a GPU

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weights, ids, kind, chunk,
                scale, cap):
        N, (V, d), device = len(student_hidden), student_head.shape, student_head.device
        new = partial(torch.empty, device=device, dtype=torch.float32)
        grad_hidden, grad_head, per_token = new(N, d), new(V, d).zero_(), new(5, N)
        student_logits, teacher_logits = new(2, min(chunk, N), V)
        rows = max(1, ChunkedDivergence.BLOCK[device.type] // V)
        for start in range(0, N, chunk):  # products, in chunks as large as memory allows
            h, th = student_hidden[start:start + chunk], teacher_hidden[start:start + chunk]  # [n, d]
            s, t = student_logits[:len(h)], teacher_logits[:len(h)]  # [n, V]
            float32_product(h, student_head.T, s)
            float32_product(th, teacher_head.T, t)
            for row in range(0, len(h), rows):  # softmax and divergence, a few rows of the chunk at a time
                block, at = slice(row, row + rows), slice(start + row, start + min(row + rows, len(h)))
                (s_block, slope), (t_block, _) = (finish_logits(x[block], scale, cap) for x in (s, t))
                log_p, log_q = s_block.log_softmax(-1), t_block.log_softmax(-1)
                p, q = log_p.exp(), log_q.exp()
                divergence, gradient = divergence_and_gradient(p, log_p, q, log_q, kind)
                student_entropy, teacher_entropy = -(p * log_p).sum(-1), -(q * log_q).sum(-1)
                logprob = log_p.gather(-1, ids[at, None])[:, 0]
                w = weights[at]  # here a fork weighs tokens by their entropies or divergence
                per_token[:, at] = torch.stack([divergence, student_entropy, teacher_entropy, logprob, w])
                torch.mul(gradient, w[:, None] * slope, out=s[block])  # logits become w dD/dlogits
            float32_product(s, student_head, grad_hidden[start:start + chunk])
            float32_product(s.T, h, grad_head, add=True)
        ctx.gradients = grad_hidden.to(student_hidden.dtype), grad_head.to(student_head.dtype)
        ctx.mark_non_differentiable(per_token)
        divergence, _, _, _, w = per_token
        return (w * divergence).sum(), per_token

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # scaled in place to save a second [V, d]: hence one backward only
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), *[None] * 8

def finish_logits(raw, scale, cap):  # raw = h W^T [n, V] -> cap tanh(scale raw / cap), and its slope in raw
    logits = raw if scale == 1 else raw.mul_(scale)
    if cap is None:
        return logits, scale
    return cap * torch.tanh(logits / cap), scale / torch.cosh(logits / cap) ** 2  # 1 - tanh^2 would cancel

def float32_product(a, b, out, add=False):
    """out [n, m] = a [n, k] @ b [k, m] (+ out), summed in float32. A GPU's tensor cores take bfloat16 as it
    is: exact for logits; rounding dL/dlogits to it costs the gradients 0.17 %, as much as rounding them."""
    if b.is_cuda and b.dtype == torch.bfloat16:
        return torch.addmm(out, a.bfloat16(), b, beta=int(add), out_dtype=torch.float32, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)  # beta 0: what out held is not read

def distill_loss(student_hidden, student_head, teacher_hidden, teacher_head, weights, divergence="reverse_kl",
                 chunk=256, tokens=None, scale=1.0, cap=None):
    """sum_n weights[n] D(student_n, teacher_n): exact over the vocabulary, never [N, V] in memory.
    student_hidden [N, d], student_head [V, d] get gradients; teacher_hidden [N, d'], teacher_head [V, d'] do
    not. weights [N] float32; tokens [N] sampled ids; scale, cap: see finish_logits. A token of `chunk` takes
    8 V bytes, on a GPU 10 V. Returns the loss (float32 scalar) and stats without gradient: kl (divergence),
    student_entropy, teacher_entropy (means over N, nats/token); logprob [N] = log p(token), given tokens."""
    ids = torch.zeros(len(weights), dtype=torch.long, device=weights.device) if tokens is None else tokens
    loss, per_token = ChunkedDivergence.apply(student_hidden, student_head, teacher_hidden, teacher_head,
                                              weights, ids, divergence, chunk, scale, cap)
    stats = dict(zip(("kl", "student_entropy", "teacher_entropy"), per_token[:3].mean(-1)))
    return loss, stats if tokens is None else stats | dict(logprob=per_token[3])

# --------------------------------------------------------------------------------------- STUDENT AND TEACHER
# One sharded module serves both: thetabar is a second set of shards, copied into the first for one pass.
# After a forward the root's weights may still be gathered: reshard() before anything reads or writes shards.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of activations, thetabar, the engine

class SelfDistillation(nn.Module):
    """A causal LM whose forward returns hidden states or, given the teacher's, the loss: both inside the
    root's forward, whose FSDP2 hooks gather the embedding, the last norm and the head."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.logit_options = lm, logit_scale_and_cap(lm.config)
        self.eval()  # no dropout whatever the config says: the engine has none
        for layer in lm.get_decoder().layers:
            layer.training = True  # else transformers does not recompute it, for gradient checkpointing

    def forward(self, inputs, predicts, *loss_inputs, **loss_options):
        """inputs [b, T], predicts [N] of right_pad; padding is behind, where no token sees it. Returns hidden
        states [N, d] or, given (teacher_hidden, teacher_head, weights), what distill_loss returns."""
        hidden = self.lm.get_decoder()(inputs, use_cache=False).last_hidden_state  # [b, T, d]
        hidden = hidden.flatten(0, 1)[predicts]  # [N, d]
        if not loss_inputs:
            return hidden
        head = self.lm.get_output_embeddings().weight
        return distill_loss(hidden, head, *loss_inputs, **self.logit_options, **loss_options)

def read_weights(base):  # the whole model, float32, checked; for rank 0, before the engine starts
    auto = AutoModelForCausalLM if base.config.model_type in CAUSAL_LMS else AutoModelForMultimodalLM
    with evaluator.blaming(f"--model {base.name}: expected the weights of its config.json, found"):
        lm, info = auto.from_pretrained(base.name, dtype=torch.float32, output_loading_info=True,
                                        attn_implementation=base.empty.config._attn_implementation)
        check_weights(base, lm, sorted(info["missing_keys"]))
    return lm

def load_model(base, device, cfg):  # base in shards; rank 0 broadcasts its weights, and forgets them
    lm, source = base.empty, base.loaded or base.empty  # other ranks have nothing to read
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {f"{lm.base_model_prefix}.{name}": w for name, w in source.get_decoder().state_dict().items()}
    weights["lm_head.weight"] = source.get_output_embeddings().weight
    model = shard(SelfDistillation(lm), device).to_empty(device=device)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(lm, weights, options=options)
    for buffer, original in zip(lm.get_decoder().buffers(), source.get_decoder().buffers()):  # rotary tables
        dist.broadcast(buffer.copy_(original), src=0)  # copied onto itself where there is nothing to read
    base.loaded = None
    return model

def shard(model, device):
    """FSDP2: a group a decoder layer, one of all else, where tied weights stay tied; a replica a node."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = dist.get_world_size() // local, local
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if shape[0] > 1 else mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=DTYPE, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)  # it would round the tokens' weights to bfloat16
    for layer in model.lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)

def checkpoint_weights(lm, dtype, both_names=False):
    """(name, gathered tensor) as in a checkpoint, for engine and export; collective. A layer at a time, whose
    experts, which transformers fuses, come apart. Tied weights come once, or under both names."""
    tied, layer_of = lm.all_tied_weights_keys, lambda item: re.sub(r"(\.\d+\.).*", r"\1", item[0])
    for _, layer in itertools.groupby(lm.state_dict(keep_vars=True).items(), layer_of):
        weights = {name: p.detach().to(dtype) for name, p in layer if name not in tied}
        gathered = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
        for name, w in revert_weight_conversion(lm, gathered).items():
            yield name, w
            yield from ((other, w) for other, source in tied.items() if both_names and source == name)

def snapshot(model, dtype=None):  # a copy of theta's shards by name
    model.reshard()
    return {name: p.detach().to(dtype or DTYPE, copy=True) for name, p in model.lm.named_parameters()}

@torch.no_grad()
def copy_into(model, weights):  # into the shards, where FSDP reads: it would not see other pointers
    model.reshard()
    for name, p in model.lm.named_parameters():
        p.copy_(weights[name])

def refresh(model, thetabar, step, cfg):  # thetabar <- theta after every M steps
    due = cfg.refresh_every and step % cfg.refresh_every == 0
    return snapshot(model) if due else thetabar

# -------------------------------------------------------------------------------------------------- ROLLOUTS
class Problem(NamedTuple):
    text: str  # or messages
    answer: str | None
    student: list  # token ids of the two prompts
    teacher: list

def batch_at(n, step, batch_size, seed):
    """Indices of step 0, 1, ...: slices of one permutation of range(n) after another. A pure function:
    resuming needs no sampler. n=3, batch_size=2: step 1 has an epoch's last and the next one's first."""
    at = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(n), n) for epoch in {k // n for k in at}}
    return [orders[k // n][k % n] for k in at]

@dataclass
class Rollout:
    index: int  # of the problem
    ids: list  # y as sampled, with the end-of-turn token unless it was cut; never decoded and tokenised again
    logprobs: list  # the engine's, of each of these tokens
    finished: bool
    correct: bool | None = None  # None where no answer is known

class RolloutEngine:
    """vLLM in this rank's process; `vllm_tp` consecutive ranks are one engine with a share of the batch. On a
    GPU it sleeps while we train. load_format "dummy": `sync` brings weights; "auto": base's own (eval.py)."""

    def __init__(self, base, cfg, load_format="dummy"):
        evaluator.say(f"starting vLLM with {base.name}, which takes up to some minutes ...")
        cuda, length = torch.cuda.is_available(), cfg.max_prompt_tokens + cfg.max_response_tokens
        self.tp, self.sleeps, before = cfg.vllm_tp, cuda and load_format == "dummy", dict(os.environ)
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        if not cuda:  # a cache of 1 GiB; no compiler to wait for at the first request
            defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        os.environ.update(defaults | before)
        from vllm import LLM
        from vllm.model_executor.models.transformers import base as wrapped
        # a family without a class in vLLM: its compiler would change transformers' class, the trainer's too
        wrapped.Base._decorate_for_torch_compile = lambda self: None
        self.llm = LLM(base.name, distributed_executor_backend="external_launcher", seed=cfg.seed,
                       tensor_parallel_size=cfg.vllm_tp, gpu_memory_utilization=cfg.vllm_memory,
                       max_model_len=length, max_num_seqs=256, max_num_batched_tokens=max(8192, length),
                       enable_chunked_prefill=cuda,  # on CPU it cannot rewind a request's own generator
                       enable_prefix_caching=None if cuda else False,  # hybrids would need chunked prefill
                       load_format=load_format, enable_sleep_mode=self.sleeps, enforce_eager=not cuda,
                       disable_log_stats=True, use_tqdm_on_load=False, dtype=engine_dtype(base.config),
                       hf_overrides=partial(engine_config, text_only=load_format == "dummy"))
        os.environ["LOCAL_WORLD_SIZE"] = before["LOCAL_WORLD_SIZE"]  # on CPU vLLM rewrites it
        self.llm.llm_engine.engine_core._finalizer.detach()  # its exit hook destroys our process groups too
        dist.barrier()
        for shared in Path("/dev/shm").glob("-*cpushm*"):  # ours, open by now; left, they block the next
            shared.unlink(missing_ok=True)
        self.sleep()

    def sync(self, model):
        """theta into the engine's own tensors (CUDA graphs stay valid), a layer at a time; collective. Where
        the engine has a head of its own it gets one, even if the trainer's is tied to the embedding."""
        model.reshard()
        has_head, = self.llm.apply_model(lambda engine: any(
            name.endswith("lm_head") for name, _ in engine.named_modules(remove_duplicate=False)))
        weights = checkpoint_weights(model.lm, self.llm.llm_engine.model_config.dtype, both_names=has_head)
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # its keys and values are the old weights'

    def sleep(self):
        if self.sleeps:
            self.llm.sleep(level=2)

    def share(self, items):  # this engine's slice of them, the same on all its tensor-parallel ranks
        engine, engines = dist.get_rank() // self.tp, dist.get_world_size() // self.tp
        return items[engine * len(items) // engines:(engine + 1) * len(items) // engines]

    def gather(self, mine):  # the inverse: shares -> all items in their order, on every rank
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
        return sum(shares[::self.tp], [])

    def generate(self, prompts, seeds, **sampling):
        """A sample of each list of prompt ids, see `sampled`; its seed makes it independent of the rank."""
        from vllm import SamplingParams
        params = [SamplingParams(**sampling, seed=seed, detokenize=False, logprobs=0) for seed in seeds]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [sampled(output.outputs[0]) for output in outputs]

def sampled(y):  # vLLM's completion -> (ids, their logprobs before temperature, finished)
    logprobs = [of[token].logprob for token, of in zip(y.token_ids, y.logprobs)]  # `of` has no other token
    return list(y.token_ids), logprobs, y.finish_reason == "stop"

def sample_rollouts(engine, problems, indices, step, tokenizer, cfg):
    """A graded rollout of each problem of `indices`, in order, on every rank; the engines share the work."""
    # by run seed, step, problem, and which of its rollouts, where B exceeds the data; not by rank
    seeds = [int(digest((cfg.seed, step, i, indices[:k].count(i)))[:8], 16) for k, i in enumerate(indices)]
    mine = engine.share(indices)
    samples = engine.generate([problems[i].student for i in mine], engine.share(seeds),
                              max_tokens=cfg.max_response_tokens, temperature=cfg.temperature)
    rollouts = [Rollout(i, *sample) for i, sample in zip(mine, samples)]
    evaluator.grade_rollouts(rollouts, problems, tokenizer)
    return engine.gather(rollouts)

def keep_rollouts(rollouts, cfg):  # to train on: by default all, cut and wrong ones too
    return [r for r in rollouts if cfg.keep == "all" or r.correct]

# --------------------------------------------------------------------------------------------- TRAINING STEP
class MicroBatch(NamedTuple):
    student: tuple  # inputs [b, T] and predicts [N] of student prompt + response
    teacher: tuple  # inputs [b, T'] and predicts [N] of teacher prompt + the same response
    tokens: torch.Tensor  # [N] the responses, one after another
    weights: torch.Tensor  # [N]
    logprobs: torch.Tensor  # [N] the engine's

def token_weights(rollouts):  # of each token in the loss: 1 / (B |y|), B rollouts kept on all ranks
    return [[1 / (len(rollouts) * len(r.ids))] * len(r.ids) for r in rollouts]

def plan_micro_batches(lengths, budget, rank, world):
    """Indices of `lengths` for `rank` to compute, in groups of at most `budget` padded tokens (or one
    sequence), a twentieth of it padding. Longest first, each rank gets one in turn: all have equally many
    groups. Lengths [9, 3, 9, 8, 8, 3], world 2, budget 20: rank 0 has [[0, 3], [1]]."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = []
    for deal in (order[k:k + world] for k in range(0, len(order), world)):  # a sequence a rank, longest first
        group = [*(groups[-1] if groups else []), deal]
        widths = [lengths[longest] for longest, *_ in group]  # rank 0's; the others' are not wider
        padded = widths[0] * len(group)
        if groups and padded <= budget and padded - sum(widths) <= budget / 20:
            groups[-1] = group
        else:
            groups.append([deal])
    return [[deal[rank] for deal in group if rank < len(deal)] for group in groups]

def right_pad(prompts, responses, device):
    """Lists of ids -> inputs [b, T] and predicts [N], the flat places whose logits are for a response token.
    Prompt [5, 6, 7] and response [8, 9] give the input 5 6 7 8, whose places 2 and 3 predict 8 and 9."""
    sequences = [prompt + response[:-1] for prompt, response in zip(prompts, responses)]
    inputs = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    predicts = [row * inputs.shape[1] + torch.arange(len(prompt) - 1, len(ids))
                for row, (prompt, ids) in enumerate(zip(prompts, sequences))]
    return inputs.to(device), torch.cat(predicts).to(device)

def make_micro_batches(rollouts, problems, device, cfg):
    """This rank's MicroBatches, the same number on all ranks, as FSDP's collectives demand: a rank without a
    sequence for one of them computes the shortest rollout with weight 0."""
    weights, shortest = token_weights(rollouts), min(rollouts, key=lambda r: len(r.ids))
    longer = lambda p: max(p.student, p.teacher, key=len)
    lengths = [len(longer(problems[r.index])) + len(r.ids) for r in rollouts]
    packed, batches = lambda lists: torch.tensor(sum(lists, []), device=device), []
    for group in plan_micro_batches(lengths, cfg.micro_batch_tokens, dist.get_rank(), dist.get_world_size()):
        mine = [rollouts[i] for i in group] or [shortest]
        w = [weights[i] for i in group] or [[0.0] * len(shortest.ids)]
        prompts, responses = [problems[r.index] for r in mine], [r.ids for r in mine]
        batches.append(MicroBatch(right_pad([p.student for p in prompts], responses, device),
                                  right_pad([p.teacher for p in prompts], responses, device),
                                  packed(responses), packed(w), packed([r.logprobs for r in mine])))
    return batches

def teacher_pass(model, thetabar, batches):
    """The teacher's last hidden states [N, d] of every micro-batch, and its head [V, d]; logits would be 37
    times larger for Qwen3-8B. Afterwards theta is back, bit for bit."""
    theta = snapshot(model, torch.float32)
    copy_into(model, thetabar)
    with torch.no_grad():
        hidden = [model(*batch.teacher) for batch in batches]
    model.reshard()
    head = model.lm.get_output_embeddings().weight.detach().to(DTYPE, copy=True)  # thetabar's still
    copy_into(model, theta)
    return hidden, head.full_tensor()

# How far engine and trainer, two implementations of one model, may be apart in a sampled token's
# log-probability, nats, on average. Working syncs have 1e-2 and 3e-7, stale weights 0.2.
MAX_GAP = {torch.bfloat16: 0.1, torch.float32: 1e-3}

def student_pass(model, batches, hidden, head, cfg):
    """Forward and backward of all micro-batches -> the loss, means over all tokens. RuntimeError: MAX_GAP."""
    sums, gap_max = torch.zeros(5, device=head.device), torch.zeros((), device=head.device)
    for batch, teacher_hidden in zip(batches, hidden):
        loss, stats = model(*batch.student, teacher_hidden, head, batch.weights, divergence=cfg.divergence,
                            chunk=cfg.loss_chunk, tokens=batch.tokens)
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the loss is a sum over them
        trained = batch.weights > 0  # all tokens of a micro-batch or none, see make_micro_batches
        n, gap = trained.sum(), ((stats["logprob"] - batch.logprobs) * trained).abs()
        entropies = stats["student_entropy"] * n, stats["teacher_entropy"] * n
        sums += torch.stack([loss.detach(), *entropies, gap.sum(), n])
        gap_max = gap_max.maximum(gap.max())
    dist.all_reduce(sums)
    dist.all_reduce(gap_max, op=dist.ReduceOp.MAX)
    sums[1:4] /= sums[4].clamp(min=1)
    loss, student_entropy, teacher_entropy, gap, _ = sums.tolist()
    limit = MAX_GAP[engine_dtype(model.lm.config)]
    if math.isfinite(loss) and not gap <= limit:  # a NaN gap stops too; a NaN loss is dropped by `update`
        raise RuntimeError(f"engine and trainer differ by {gap:.4f} nats/token, expected at most {limit}: no "
                           "update. See README, Families; checkpoint_weights; the version of vLLM")
    return dict(loss=loss, student_entropy=student_entropy, teacher_entropy=teacher_entropy, logprob_gap=gap,
                logprob_gap_max=gap_max.item())

def update(model, optimizer, cfg):  # drops a gradient that is not finite; returns the norm before clipping
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf).full_tensor().item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm

def train_step(model, thetabar, optimizer, rollouts, problems, device, cfg):  # one update -> its metrics
    batches = make_micro_batches(rollouts, problems, device, cfg)
    metrics = student_pass(model, batches, *teacher_pass(model, thetabar, batches), cfg)
    return metrics | dict(grad_norm=update(model, optimizer, cfg))

# ------------------------------------------------------------------------------------------------------ MAIN
def main():
    device = start_processes()
    cfg = parse_settings()
    base, problems, out = prepare(cfg)
    engine = RolloutEngine(base, cfg)  # first: it asks how much of the GPU's memory is free
    model = load_model(base, device, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    thetabar = snapshot(model)
    done = load_newest(out, model, optimizer, thetabar, cfg) if cfg.resume else 0  # fills them in place
    trim_logs(out, done)
    skipped = idle = 0  # steps in a row without a finite gradient, and without a rollout kept
    for step in range(done + 1, cfg.steps + 1):
        start = time.perf_counter()
        metrics = dict(step=step, lr=optimizer.param_groups[0]["lr"],
                       teacher_age=(step - 1) % (cfg.refresh_every or cfg.steps))
        engine.sync(model)
        indices = batch_at(len(problems), step - 1, cfg.batch_size, cfg.seed)
        begun = time.perf_counter()
        rollouts = sample_rollouts(engine, problems, indices, step, base.tokenizer, cfg)
        metrics["seconds_generate"] = time.perf_counter() - begun
        engine.sleep()
        kept = keep_rollouts(rollouts, cfg)
        if kept:
            metrics |= train_step(model, thetabar, optimizer, kept, problems, device, cfg)
        thetabar = refresh(model, thetabar, step, cfg)

        skipped = 0 if math.isfinite(metrics.get("grad_norm", 0)) else skipped + 1
        idle = 0 if kept else idle + 1
        metrics |= dict(skipped_updates=skipped, seconds_step=time.perf_counter() - start)
        log_step(out, metrics, rollouts, problems, base.tokenizer)
        if skipped == 3 or idle == 10:
            raise RuntimeError(f"in a row, {skipped} gradients were not finite, {idle} steps kept no rollout")
        if step % cfg.save_every == 0 or step == cfg.steps:
            save_checkpoint(out, step, model, optimizer, thetabar)
        if cfg.export_every and step % cfg.export_every == 0:
            export(model, base, out, f"model-{step}")
    export(model, base, out, "model")
    evaluator.say(f"done: {out}/model is that of step {max(done, cfg.steps)}")

# ------------------------------------------------------------------------------------------------ CHECKPOINT
# checkpoint-K/ holds theta, Adam's state and thetabar in shards that any number of ranks can read. What is
# being written is called UNFINISHED; nothing else is replaced but the run's own checkpoints, logs and model.
UNFINISHED = "unfinished"

def training_state(model, optimizer, thetabar):
    model.reshard()
    adam = dcp_state.get_optimizer_state_dict(model, optimizer)
    return {"theta": dict(model.lm.named_parameters()), "thetabar": thetabar, "optimizer": adam}

def save_checkpoint(out, step, model, optimizer, thetabar):
    if not optimizer.state:  # no update was made yet: Adam has nothing to save
        return
    try:
        dcp.save(training_state(model, optimizer, thetabar), checkpoint_id=out / UNFINISHED)
    except dcp.CheckpointException as error:  # on a full disk it speaks of unexpected positions in a file
        if shutil.disk_usage(out).free < 2**20:
            raise OSError(f"{out}: no space left on the device") from error
        raise
    if dist.get_rank() == 0:
        (out / UNFINISHED).rename(out / f"checkpoint-{step}")
        for _, old in checkpoints(out)[2:]:
            shutil.rmtree(old, onerror=lambda *_: evaluator.say(
                f"{old} is not needed, but could not be removed"))
    dist.barrier()

def checkpoints(out):  # [(step, folder)] of finished ones, newest first
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(((int(path.name[11:]), path) for path in found), reverse=True)

def load_newest(out, model, optimizer, thetabar, cfg):
    """Fills theta, Adam's state and thetabar from the newest checkpoint that is whole -> the steps done.
    Damaged ones that are newer get another name, and are kept."""
    found = [checkpoints(out)]
    dist.broadcast_object_list(found)  # rank 0's: another node may still see an older list
    for at, (step, path) in enumerate(found[0]):
        state = training_state(model, optimizer, thetabar)
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.CheckpointException as error:  # on all ranks
            evaluator.say(f"skipping {path}, which is not whole: {damage(path, error)}")
            continue
        dcp_state.set_optimizer_state_dict(model, optimizer, state["optimizer"])
        optimizer.param_groups[0].update(lr=cfg.lr, weight_decay=cfg.weight_decay)  # not the checkpoint's
        for _, damaged in found[0][:at] if dist.get_rank() == 0 else ():
            damaged.rename(out / f"damaged-{damaged.name}-{time.time():.0f}")
        evaluator.say(f"--resume: {step} steps are done")
        return step
    evaluator.check(not found[0], f"--resume: no checkpoint in {out} is whole; name another --out to start "
                    "anew")
    return 0

# What torch says of a file that is cut, overwritten or missing. Other errors may pass, as a file system's do
DAMAGE = re.compile(r"EOFError|UnpicklingError|PytorchStreamReader|metadata is None|\[Errno 2\]")

def damage(path, error):  # why a checkpoint is not whole. RuntimeError: it may be
    for cause, _ in error.failures.values():
        text = f"{type(cause).__name__}: {str(cause).strip():.300}"
        if not DAMAGE.search(text) or re.search(r"\[Errno (?!2\])", text):
            raise RuntimeError(f"--resume: {path} may be whole, but could not be loaded: {text}. Nothing was "
                               "changed; repeat the command when this is mended") from error
    return text

def trim_logs(out, step):  # later steps come again, and a kill may have cut the last line
    for log in (out / "metrics.jsonl", out / "samples.jsonl"):
        if dist.get_rank() == 0 and log.exists():
            lines = log.read_text().splitlines(keepends=True)
            replace_file(log, "".join(line for line in lines
                                      if line.endswith("}\n") and json.loads(line)["step"] <= step))

def remove_unfinished(out):  # what a kill left
    for path in out.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)

def replace_file(path, text):  # written beside and renamed: a kill never leaves half a file
    path.with_name(UNFINISHED).write_text(text)
    path.with_name(UNFINISHED).replace(path)

def export(model, base, out, name):
    """out/name/: theta in bfloat16, gathered in rank 0's memory, and the base's other files as they came."""
    model.reshard()
    gathered = checkpoint_weights(model.lm, torch.bfloat16)
    weights = {name: w.to("cpu", copy=True) for name, w in gathered if dist.get_rank() == 0}
    if dist.get_rank() == 0:
        folder, text = out / UNFINISHED, base.empty.config
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in base.folder.glob("*.*"):
            if re.search(r"(?<!index)\.(json|jinja|txt|model|tiktoken)$", path.name):
                shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text())
        if "text_config" in config:  # of a multimodal model the text model's
            config = config["text_config"] | {name: getattr(text, name) for name in (
                "model_type", "architectures", "tie_word_embeddings", "eos_token_id", "pad_token_id")}
        rope = config.get("rope_parameters") or {}  # transformers 4 looks for rope_theta beside it
        config |= {name: rope[name] for name in rope if name == "rope_theta"} | dict.fromkeys(
            ("dtype", "torch_dtype"), "bfloat16")
        replace_file(folder / "config.json", json.dumps(config, indent=2))
        save_torch_state_dict(weights, folder)
        for path in folder.glob("*.safetensors"):  # made for their owner alone
            path.chmod((folder / "config.json").stat().st_mode)
        if (out / name).exists():  # an earlier run's, which no kill may leave half removed
            (out / name).rename(out / f"{UNFINISHED}-{name}")
        folder.rename(out / name)
        remove_unfinished(out)
    dist.barrier()

# -------------------------------------------------------------------------------------------------- FAMILIES
# How families of models differ, all of it, and which cannot be trained.
@dataclass
class Base:  # the model that a run starts from, opened and checked once
    name: str  # hub id or folder
    folder: Path  # of its files; of a hub id's, in the cache
    config: object
    tokenizer: object
    weights: str  # digest of their content, or a hub id's commit
    empty: nn.Module | None = None  # its text model on the meta device: no weights
    loaded: nn.Module | None = None  # the whole model, on rank 0 until it is in shards

def open_base(name, to_train):
    """A Base without its weights. ValueError: no chat model or, to_train, one that would train wrongly."""
    files = [path for path in sorted(Path(name).glob("*")) if path.suffix in (".safetensors", ".bin")]
    with evaluator.blaming(f"--model {name}: expected a folder with a chat model, or the id of one on the "
                           "hub, found"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # else it asks on the terminal
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        text, folder = config.get_text_config(), Path(cached_file(name, "config.json")).parent
        evaluator.check(tokenizer.chat_template, "no chat template; save a tokenizer with one there")
        evaluator.check(files or not Path(name).exists(), "no weights, .safetensors or .bin; copy them there")
        evaluator.check(abs(text.pad_token_id or 0) < text.vocab_size,
                        f"pad_token_id {text.pad_token_id} of no token")
    weights = digest([*map(digest_weights, files)]) if files else config._commit_hash
    base = Base(name, folder, config, tokenizer, weights)
    if to_train:
        with evaluator.blaming(f"--model {name}: expected a causal language model of plain weights and "
                               "layers, found"):
            kind = (config.architectures or ["?"])[0]
            evaluator.check(kind.endswith(("ForCausalLM", "ForConditionalGeneration"))
                            and not config.is_encoder_decoder and text.model_type in CAUSAL_LMS,
                            f"{kind} of type {text.model_type}")
            evaluator.check(not (folder / "modules.json").exists(), "an embedding model")
            evaluator.check(not any(getattr(c, "quantization_config", 0) for c in (config, text)),
                            "quantised weights")
            with torch.device("meta"):
                base.empty = AutoModelForCausalLM.from_config(text_config(config), dtype=torch.float32)
            SelfDistillation(base.empty)  # fails where there are no .layers
    return base

def digest_weights(path):  # of all content: a copy is the same model, one trained further another
    with evaluator.blaming(f"{path}: expected weights, found a pointer or half a file"):
        if path.suffix == ".safetensors":  # of a .bin transformers says as much
            safetensors.safe_open(path, "pt")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

def check_ids(base, prompts):
    rows, largest = base.config.get_text_config().vocab_size, max(map(max, prompts), default=0)
    evaluator.check(largest < rows, f"--model {base.name}: expected token ids below {rows}, the rows of its "
                    f"embedding, found {largest}, {base.tokenizer.decode([largest])!r}; mend one of the two")

def text_config(config):  # of a multimodal model its text model: that is trained, run and exported
    text = config.get_text_config()
    if text is not config:
        text.architectures = [CAUSAL_LMS[text.model_type]]
    if getattr(text, "attn_logit_softcapping", None):
        text._attn_implementation = "eager"  # sdpa leaves this soft cap out, silently
    return text

def engine_config(config, text_only):  # vLLM's view: logits in float32, windows and queries as the trainer's
    config = text_config(config) if text_only else config
    text = config.get_text_config()
    text.head_dtype = config.head_dtype = "float32"
    if text.model_type.startswith("cohere2"):
        text.sliding_window -= 1  # vLLM adds one to it, transformers does not
    rope = getattr(text, "rope_parameters", None) or {}
    if "llama_4_scaling_beta" in rope:  # of Ministral 3's queries; vLLM has another name for it
        text.llama_4_scaling = rope | dict(beta=rope["llama_4_scaling_beta"])
    return config

def engine_dtype(config):  # gated delta-nets have kernels for bfloat16 only
    delta_net = hasattr(config.get_text_config(), "linear_key_head_dim")
    return torch.bfloat16 if delta_net else DTYPE

def logit_scale_and_cap(config):  # for finish_logits; check_weights sees whether that is all
    of = lambda name: getattr(config.get_text_config(), name, None) or 1
    return dict(scale=of("logit_scale") * of("lm_head_multiplier") / of("logits_scaling"),
                cap=getattr(config.get_text_config(), "final_logit_softcapping", None))

@torch.no_grad()
def check_weights(base, lm, missing):
    """Are they whole, and does the loss compute this model's logits? Its own forward gets eight tokens, ours
    the same eight and four more. Where the likeliest next tokens' log-probabilities differ, there is more to
    the logits than logit_scale_and_cap knows, or a token sees later ones."""
    eight, twelve, head = torch.arange(8), torch.arange(12)[None], lm.get_output_embeddings().weight
    own, likeliest = lm.eval()(eight[None], use_cache=False).logits[0].log_softmax(-1).max(-1)
    ours = SelfDistillation(lm)
    _, stats = ours(twelve, eight, ours(twelve, eight), head, torch.ones(8), tokens=likeliest)
    error, tied = (stats["logprob"] - own).abs().max().item(), bool(base.empty.all_tied_weights_keys)
    evaluator.check(not missing, f"none of {missing[:3]}")
    evaluator.check(tied == bool(lm.all_tied_weights_keys), "two tensors for embedding and head, which its "
                    "config.json says are one; set tie_word_embeddings to false")
    evaluator.check(all(w.isfinite().all() for w in lm.state_dict().values()),
                    "NaN or infinity; take another copy")
    evaluator.check(error <= 1e-3, f"log-probabilities that are {error:.1g} nats from those that the loss "
                    "computes; logit_scale_and_cap is not all, or tokens see later ones")

# ---------------------------------------------------------------------------------------------------- CHECKS
# What is wrong with an input is said before the engine starts: expected, found, what to change.
def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

def read_instruction(name):  # c's text: `name` is a key of INSTRUCTIONS in any case, @FILE, or the text
    text = INSTRUCTIONS.get(name.replace(" ", "").lower(), name).strip()
    if name.startswith("@"):
        with evaluator.blaming(f"--instruction {name}, expected a text file in the encoding UTF-8"):
            text = Path(name[1:]).read_text("utf-8-sig").strip()
    # one word is a key mistyped, and would be trained on without a sign; Chinese has no spaces
    evaluator.check(re.search(r"\s|[^!-~]", text),
          f"--instruction {name}: expected {', '.join(INSTRUCTIONS)}, @FILE or a text, found {text!r}")
    return text

MAY_BE_0 = "lr", "weight_decay", "clip", "temperature", "refresh_every", "export_every", "seed", "top_k"

def check_settings(settings):  # of both scripts, {option: value}
    for name, value in settings.items():
        if type(value) in (int, float):
            evaluator.check(math.isfinite(value) and (value > 0 or value == 0 and name in MAY_BE_0),
                  f"--{name} {value}: expected {'0 or more' if name in MAY_BE_0 else 'more than 0'}")
    evaluator.check(torch.cuda.is_available() or not torch.version.cuda,  # it would run on the CPU, unsaid
          "no GPU is seen: expected a driver R580 or newer; without a GPU take the README's CPU builds")
    evaluator.check(os.environ.get("OMP_NUM_THREADS") != "0",  # every rank would take every core
          "OMP_NUM_THREADS=0: expected the number of threads of a rank; unset it, or name 1 or more")
    tp, world = settings["vllm_tp"], dist.get_world_size()
    evaluator.check(world % tp == 0,
                    f"--vllm_tp {tp}: expected a divisor of the number of ranks, which is {world}")

def load_problems(cfg, base, instruction):  # in the data's order, once each, without those of long prompts
    prompt = partial(prompt_ids, base.tokenizer, thinking=cfg.thinking, wrapper=cfg.wrapper)
    problems = [Problem(p["problem"], p["answer"], prompt(p["problem"], tools=p["tools"]),
                        prompt(p["problem"], instruction, tools=p["tools"]))
                for p in evaluator.read_problems(cfg.data, *WRAPPERS[cfg.wrapper])]
    check_ids(base, [p.student + p.teacher for p in problems])
    short = [p for p in problems if max(len(p.student), len(p.teacher)) <= cfg.max_prompt_tokens]
    evaluator.say(f"{len(short)} of {len(problems)} problems have prompts of at most {cfg.max_prompt_tokens} "
                  f"tokens; {evaluator.__file__} grades the rollouts")
    evaluator.check(any(cfg.keep == "all" or p.answer for p in short), f"--data {cfg.data}: found no problem "
                    f"with a prompt of at most {cfg.max_prompt_tokens} tokens and, for --keep correct, an "
                    "answer")
    return short

# What --resume lets change, and says. All else is as it was, or the run would not go on as it began
MAY_CHANGE = ("model", "data", "out", "steps", "lr", "weight_decay", "clip", "save_every", "export_every",
              "micro_batch_tokens", "loss_chunk", "gradient_checkpointing", "replicas", "vllm_tp",
              "vllm_memory")
RESULTS = r"checkpoint-\d+|model(-\d+)?"  # names in --out
RUN_FILES = rf"{RESULTS}|config\.json|(metrics|samples)\.jsonl|{UNFINISHED}.*|eval\.lock"

def parse_settings():  # a mistyped one is one line, from one rank
    parser = HfArgumentParser(Config)
    parser.error = evaluator.refuse_words
    return Config(**vars(parser.parse_args()))

def prepare(cfg):  # all checks -> the base model, on rank 0 with its weights, problems, the run's folder
    check_settings(asdict(cfg))
    instruction, base, out = read_instruction(cfg.instruction), open_base(cfg.model, True), Path(cfg.out)
    context = getattr(base.config.get_text_config(), "max_position_embeddings", math.inf)
    evaluator.check(cfg.max_prompt_tokens + cfg.max_response_tokens <= context,
          f"--max_prompt_tokens + --max_response_tokens: expected at most the model's context, {context}")
    problems = load_problems(cfg, base, instruction)
    evaluator.claim_folder(out, "opsdc.lock", RUN_FILES, "" if cfg.resume else RESULTS)
    if dist.get_rank() == 0:
        start_run(base, out, asdict(cfg) | dict(
            instruction=instruction, weights=base.weights, template=digest(base.tokenizer.chat_template),
            problems=digest([(p.text, p.answer) for p in problems])))
        evaluator.say(f"the first teacher's prompt:\n{base.tokenizer.decode(problems[0].teacher)}")
    dist.barrier()  # the others wait for rank 0's checks
    return base, problems, out

def start_run(base, out, settings):  # rank 0's checks: the run to go on with, the weights
    if checkpoints(out):
        compare_settings(out / "config.json", settings)
    remove_unfinished(out)
    base.loaded = read_weights(base)
    replace_file(out / "config.json", json.dumps(settings, indent=1))
    gigabytes = sum(p.numel() for p in base.empty.parameters()) / 1e9  # at one byte a parameter
    exports = 1 + (settings["steps"] // settings["export_every"] if settings["export_every"] else 0)
    evaluator.say(f"each of 3 checkpoints takes {(12 + DTYPE.itemsize) * gigabytes:.3g} GB, "
                  f"each of {exports} exports {2 * gigabytes:.3g} GB; "
                  f"{shutil.disk_usage(out).free / 1e9:.3g} GB are free")

def compare_settings(file, settings):  # of the run that --resume goes on with
    with evaluator.blaming(f"--resume: the settings of the run in {file}"):
        old = asdict(Config()) | json.loads(file.read_text())  # an older run lacks newer settings
        for name, value in settings.items():
            if name != "resume" and old.get(name) != value:
                evaluator.check(name in MAY_CHANGE, f"{name} is {old.get(name)!r}, not {value!r}")
                evaluator.say(f"--resume: {name} {old.get(name)} -> {value}")

# ------------------------------------------------------------------------------------------------------ LOGS
CONSOLE = ("step", "loss", "grad_norm", "response_tokens", "truncated", "accuracy", "student_entropy",
           "logprob_gap", "seconds_step")

def log_step(out, metrics, rollouts, problems, tokenizer):
    """A line of metrics.jsonl, with what the rollouts say, four of samples.jsonl, one on the console."""
    if dist.get_rank() != 0:
        return
    lengths, known = [len(r.ids) for r in rollouts], [r.correct for r in rollouts if r.correct is not None]
    metrics |= dict(response_tokens=fmean(lengths), response_tokens_min=min(lengths),
                    response_tokens_max=max(lengths), truncated=fmean(not r.finished for r in rollouts),
                    tokens_per_second=sum(lengths) / metrics["seconds_generate"],
                    accuracy=fmean(known) if known else None)
    metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    samples = [dict(step=metrics["step"], problem=problems[r.index].text, response=tokenizer.decode(r.ids),
                    answer=problems[r.index].answer, correct=r.correct, finished=r.finished, ids=r.ids)
               for r in rollouts[:4]]
    for name, rows in (("samples.jsonl", samples), ("metrics.jsonl", [metrics])):
        with open(out / name, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    known = [name for name in CONSOLE if metrics.get(name) is not None]
    evaluator.say("  ".join(f"{name} {metrics[name]:.4g}" for name in known))

# ------------------------------------------------------------------------------------------------- PROCESSES
def start_processes():  # join torchrun's group, or make one of a single rank -> this rank's device
    os.environ.update(dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
                           MASTER_ADDR="127.0.0.1", MASTER_PORT="0") | os.environ)
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    waits = "rank {RANK} waits for the others of WORLD_SIZE={WORLD_SIZE}; to run alone unset both"
    waiting = threading.Timer(30, partial(print, flush=True), [waits.format_map(os.environ)])
    waiting.start()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    waiting.cancel()
    return device

def run_and_exit(main):
    """main(), and the process is gone: Python's exit calls vLLM's and NCCL's, which wait for failed ranks."""
    status = 1
    try:
        main()
        status = 0
    except SystemExit as stop:  # --help, or a text that says why
        status = stop.code or 0
        if not isinstance(status, int):
            say_once(stop)
            status = 1
    except BaseException as error:
        say_once(error)
    sys.stdout.flush()
    os._exit(status)

def say_once(error):
    """The first rank to fail says why, and its peers end after that. Neither waits long for the store, which
    may be gone with its host."""
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    if store is None or within_seconds(10, store.add, "failed", 1) in (None, 1):
        evaluator.explain(error)
        sys.stdout.flush()
        if store:
            within_seconds(10, store.set, "said", "")
    else:
        within_seconds(10, store.wait, ["said"])

def within_seconds(seconds, call, *arguments):  # its result, or None if it fails or takes longer
    try:
        return ThreadPoolExecutor(1).submit(call, *arguments).result(seconds)
    except Exception:
        return None

if __name__ == "__main__":
    if not hasattr(evaluator, "grade_rollouts"):
        sys.exit(f"error: opsdc.py needs this project's eval.py beside it, found {evaluator.__file__}")
    run_and_exit(main)
