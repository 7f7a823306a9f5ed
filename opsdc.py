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
        loss = 1/B sum_i 1/|y_i| sum_t KL(p || q)      # exact over the vocabulary, in nats
        theta <- AdamW(theta, grad loss)       # lr 1e-6 constant, weight decay 0.01, gradient clipped at 1.0
        every M = 50 steps: thetabar <- theta  # the refresh

    torchrun --nproc_per_node 8 opsdc.py --model Qwen/Qwen3-8B      # the same lines run on CPUs: see README

Every rank holds a shard of theta and of Adam's state (FSDP2, float32), a shard of thetabar, and a vLLM engine
in its process (or a part of one, --vllm_tp). A step copies theta into the engine in place and samples; swaps
thetabar's shards into the training module for one pass that keeps the last hidden states only; swaps theta
back, and runs the student's passes, in which logits exist for `loss_chunk` tokens at a time.

Axes: B sequences of a batch, b of a micro-batch, T positions, N response tokens packed end to end, V, d.

Left out on purpose: rewards and advantages, importance ratios (a KL over the whole vocabulary needs no
correction for the small gap between engine and trainer), LoRA, schedules, several rollouts a prompt,
asynchronous rollouts. The README shows where a fork would add them.

Differences from the paper's text (P) and the authors' code (A):
 1. A: logits are float32 whatever the model's dtype; bfloat16 drowns the small KL (see THE OBJECTIVE).
 2. A: the line "Remember to put your answer ..." stands once in the teacher's prompt, not twice.
 3. A: a token weighs 1 / (B |y|), as in P, however the batch is cut into micro-batches.
 4. A: the sampled ids are trained on, not the response's text tokenised again.
 5. A: --resume goes on as if the run had not stopped; thetabar is part of the checkpoint.
 6. P: the data set's wrapper is taken off and put on here, so any set of bare problems is trained on alike.
 7. P: a problem whose teacher's prompt is longer than max_prompt_tokens is dropped, counted and said.
"""
import contextlib
import csv
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import date, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer,
                          HfArgumentParser)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.utils import has_file
from transformers.utils.logging import disable_progress_bar

# The seam to whatever measures: four functions, those of eval.py where it stands beside this file. Training
# needs none of them; a fork gives its own.
#     read_answer(row, where) -> the known answer of a row of --data, or None
#     grade_rollouts(rollouts, problems, tokenizer)      fills in .correct where the problem's answer is known
#     load_held_out(cfg, tokenizer) -> jobs              of --eval_data, whatever `validate` takes
#     validate(engine, tokenizer, jobs, cfg) -> metrics  of the engine's present weights
sys.modules.setdefault("opsdc", sys.modules[__name__])  # what eval.py imports is this module, or the fork run
try:
    import eval as measure
except ModuleNotFoundError as error:
    if error.name != "eval":
        raise
    measure = None

# ---------------------------------------------------------------------------------------------------- CONFIG
def flag(default, help, range=None):
    """range of a number: "1.." or "0..1", ends included; --help shows it."""
    return field(default=default, metadata={"help": help} | ({"metavar": range} if range else {}))

@dataclass
class Config:
    """Every setting, once; the defaults are the paper's. --batch_size and --batch-size are the same flag."""
    model: str = flag("Qwen/Qwen3-8B", "hub id or folder of a causal language model with a chat template")
    data: str = flag("BytedTsinghua-SIA/DAPO-Math-17k", "hub ID[:CONFIG[:SPLIT]], file, or folder of files")
    out: str = flag("out", "folder for metrics.jsonl, samples.jsonl, config.json, checkpoint-K/ and model/")
    instruction: str = flag("v1", "c: v1, v2, 20%%, 50%% or 80%% (fewer tokens), @FILE, or the text itself")
    wrapper: Literal["math", "none"] = flag("math", "DAPO's around each problem; none: prompts as they are")
    steps: int = flag(100, "number of updates", "1..")
    batch_size: int = flag(32, "B: problems a step, one rollout each, over all ranks", "1..")
    lr: float = flag(1e-6, "AdamW's learning rate, constant", "0..1")
    weight_decay: float = flag(0.01, "AdamW's weight decay", "0..")
    clip: float = flag(1.0, "largest norm of the gradient; 0 = no clipping", "0..")
    temperature: float = flag(1.0, "sampling temperature of the rollouts", "0..2")
    max_prompt_tokens: int = flag(1024, "problems with a longer prompt are dropped", "1..")
    max_response_tokens: int = flag(8192, "rollouts are cut here, and trained on as they are", "1..")
    refresh_every: int = flag(50, "M: thetabar <- theta after so many steps; 0 = frozen teacher", "0..")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = flag("reverse_kl", "the others are ablations")
    keep: Literal["all", "correct"] = flag("all", "rollouts to train on; 'correct' needs answers in the data")
    micro_batch_tokens: int = flag(16384, "padded tokens of a forward pass: memory, not mathematics", "1..")
    loss_chunk: int = flag(1024 if torch.cuda.is_available() else 256,  # below, a GPU waits for its memory
                           "tokens whose logits exist at a time: 8 V bytes each, on a GPU 10 V", "1..")
    gradient_checkpointing: bool = flag(True, "recompute activations in backward: less memory, more time")
    vllm_tp: int = flag(1, "ranks that share one vLLM engine (tensor parallelism)", "1..")
    vllm_memory: float = flag(0.5, "share of each GPU's memory for vLLM while it generates", "0.01..1")
    eval_every: int = flag(0, "steps between evaluations of --eval_data; 0 = none", "0..")
    eval_data: str = flag("math500", "a benchmark of eval.py, or as --data")
    eval_samples: int = flag(8, "samples a problem, at most max_response_tokens long", "1..")
    save_every: int = flag(10, "steps between checkpoints; the newest two are kept", "1..")
    resume: bool = flag(False, "go on from the newest whole checkpoint in --out")
    seed: int = flag(0, "of the order of the problems and of the sampling", "0..4294967295")
    thinking: bool = flag(True, "the chat template's enable_thinking (--no_thinking switches it off)")

# --------------------------------------------------------------------------------------------------- PROMPTS
# Student and teacher see the same problem, only the teacher the instruction. The strings are the experiment.

FORMAT = ("The last line of your response should be of the form Answer: $Answer (without quotes) "
          "where $Answer is the answer to the problem.")
WRAPPER_HEAD = f"Solve the following math problem step by step. {FORMAT}\n\n"  # of every row of DAPO-Math-17k
WRAPPER_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'
WRAPPERS = {  # before the problem in the student's prompt, and in the teacher's after c; after it in both
    "math": (WRAPPER_HEAD, f"{FORMAT}\n\n", WRAPPER_TAIL), "none": ("", "", "")}

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

def read_instruction(name):
    """The text of c: `name` is a key of INSTRUCTIONS in any case, @FILE (its stripped text) or the text. One
    word is no text but a key mistyped, which would be trained on without a sign."""
    text = INSTRUCTIONS.get(name.replace(" ", "").lower(), name).strip()
    if name.startswith("@"):
        with named(f"--instruction {name}, expected a text file in the encoding UTF-8"):
            text = Path(name[1:]).read_text("utf-8-sig").strip()
    check(re.search(r"\s|[^!-~]", text),
          f"--instruction {name}: expected {', '.join(INSTRUCTIONS)}, @FILE or a text, found {text!r}")
    return text

def chat_ids(tokenizer, problem, thinking, head="", tail=""):
    """A text or conversation, head and tail around its last user turn -> ids up to where the answer starts.
    Templates without enable_thinking ignore it."""
    messages = problem if isinstance(problem, list) else [{"role": "user", "content": problem}]
    messages = edit_last_user(messages, lambda text: head + text + tail)
    with named(f"the model's chat template fails on {str(problem):.80}"):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                             return_dict=False, enable_thinking=thinking)

def edit_last_user(messages, edit):
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return [m | {"content": edit(m["content"])} if i == last else m for i, m in enumerate(messages)]

def student_prompt(tokenizer, problem, thinking=True, wrapper="math"):
    """Token ids of what the student answers: `problem`, a text or a conversation, in the wrapper."""
    head, _, tail = WRAPPERS[wrapper]
    return chat_ids(tokenizer, problem, thinking, head, tail)

def teacher_prompt(tokenizer, problem, instruction, thinking=True, wrapper="math"):
    """The same for the teacher: `instruction`, a text, in place of the wrapper's first sentence."""
    _, head, tail = WRAPPERS[wrapper]
    return chat_ids(tokenizer, problem, thinking, f"{instruction}\n\n{head}", tail)

def fix_date(tokenizer, day):
    """For templates that print the date: a run resumed tomorrow goes on with the prompts of its first day."""
    clock = date.fromisoformat(day).strftime
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=clock)

# --------------------------------------------------------------------------------------------- THE OBJECTIVE
# loss = sum over tokens of w KL(p || q), w = 1 / (B |y|). With the student's logits s and a = log p - log q:
#     KL = sum_v p_v a_v = sum_v p_v (a_v + exp(-a_v) - 1)          dKL/ds_v = p_v (a_v - sum_u p_u a_u)
# The second sum is the one taken: the first's terms have both signs and cancel to second order, which leaves
# the rounding of the sums, 1.5e-4 of a KL of 1e-4 nats/token; the second's are never negative.
# Logits are float32 even where hidden states and heads are bfloat16: at a KL of 0.0016 nats/token, bfloat16
# logits put an error of 20 % on the loss and of 63 % on the head's gradient (README, The objective).

def kl_divergence(p, q, a):
    """KL(p || q) [n] in nats, given a = log p - log q [n, V]."""
    near = torch.neg(a).expm1_().add_(a).mul_(p)  # in place: in a CPU's cache, passes cost more than products
    far = torch.sub(q, p).addcmul_(p, a)  # the same number where exp(-a) may overflow
    return torch.where(a > -1, near, far).sum(-1)

def divergence_and_gradient(p, log_p, q, log_q, kind):
    """[n, V] of student (p) and teacher (q) -> D [n] in nats and dD/ds [n, V], s the student's logits."""
    a = log_p - log_q
    if kind == "forward_kl":  # KL(q || p)
        return kl_divergence(q, p, -a), p - q
    value = kl_divergence(p, q, a) if kind == "reverse_kl" else 0
    if kind == "jsd":  # (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2
        log_m, m = torch.logaddexp(log_p, log_q) - math.log(2), (p + q) / 2
        a = log_p - log_m
        value, a = (kl_divergence(p, m, a) + kl_divergence(q, m, log_q - log_m)) / 2, a / 2
    return value, p * (a - (p * a).sum(-1, keepdim=True))  # dD/dp_v is a_v up to a constant, which cancels

def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher) of each row, nats, float32: [N, V], [N, V] -> [N]. What the loss sums."""
    log_p, log_q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return divergence_and_gradient(log_p.exp(), log_p, log_q.exp(), log_q, "reverse_kl")[0]

class ChunkedDivergence(torch.autograd.Function):
    """Loss and both gradients in one sweep over N. Logits exist for `chunk` tokens at a time and become their
    own gradient in place; the head's gradient adds up on the way; backward only hands over what is there."""
    BLOCK = dict(cpu=620_000, cuda=10_000_000)  # logits of one softmax: in a CPU's cache, or filling a GPU

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weights, ids, kind, chunk,
                scale, cap):
        N, (V, d), device = len(student_hidden), student_head.shape, student_head.device
        new = dict(device=device, dtype=torch.float32)
        rows = max(1, ChunkedDivergence.BLOCK[device.type] // V)
        grad_hidden, grad_head = torch.zeros(N, d, **new), torch.zeros(V, d, **new)
        per_token = torch.empty(5, N, **new)  # divergence, both entropies, log p(sampled token), weight
        s_chunk, t_chunk = torch.empty(2, min(chunk, N), V, **new)
        for i in range(0, N, chunk):
            h, th = student_hidden[i:i + chunk], teacher_hidden[i:i + chunk]  # [n, d]
            s, t = s_chunk[:len(h)], t_chunk[:len(h)]  # [n, V]
            float32_product(h, student_head.T, s)
            float32_product(th, teacher_head.T, t)
            for r in range(0, len(h), rows):
                at = slice(i + r, i + min(r + rows, len(h)))  # the same rows, counted in N
                (s_v, slope), (t_v, _) = (finish_logits(x[r:r + rows], scale, cap) for x in (s, t))
                log_p, log_q = s_v.log_softmax(-1), t_v.log_softmax(-1)
                p, q = log_p.exp(), log_q.exp()
                value, gradient = divergence_and_gradient(p, log_p, q, log_q, kind)
                entropies = -(p * log_p).sum(-1), -(q * log_q).sum(-1)
                logprob = log_p.gather(-1, ids[at, None])[:, 0]
                w = weights[at]  # here a fork weighs tokens by their entropies or divergence
                per_token[:, at] = torch.stack([value, *entropies, logprob, w])
                torch.mul(gradient, w[:, None] * slope, out=s[r:r + rows])
            float32_product(s, student_head, grad_hidden[i:i + chunk])
            float32_product(s.T, h, grad_head, add=True)
        ctx.gradients = grad_hidden.to(student_hidden.dtype), grad_head.to(student_head.dtype)
        ctx.mark_non_differentiable(per_token)
        return (per_token[4] * per_token[0]).sum(), per_token

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # scaled in place to save a second [V, d]: hence one backward only
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), *[None] * 8

def finish_logits(raw, scale, cap):
    """raw = h W^T [n, V] -> the family's logits, cap tanh(scale raw / cap), and their slope in raw. Most have
    scale 1 and cap None: nothing happens."""
    logits = raw if scale == 1 else raw.mul_(scale)
    if cap is None:
        return logits, scale
    return cap * torch.tanh(logits / cap), scale / torch.cosh(logits / cap) ** 2  # 1 - tanh^2 would cancel

def float32_product(a, b, out, add=False):
    """out [n, m] = a [n, k] @ b [k, m] (+ out), summed in float32. A GPU's tensor cores take bfloat16 as it
    is: exact for logits; rounding dL/dlogits costs gradients 0.17 %, what their own rounding costs again."""
    if b.is_cuda and b.dtype == torch.bfloat16:
        return torch.addmm(out, a.bfloat16(), b, beta=int(add), out_dtype=torch.float32, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)  # beta 0: what out held is not read

def distill_loss(student_hidden, student_head, teacher_hidden, teacher_head, weights, divergence="reverse_kl",
                 chunk=256, tokens=None, scale=1.0, cap=None):
    """sum_n weights[n] D(student_n, teacher_n): exact over the vocabulary, never [N, V] in memory.

    student_hidden [N, d], student_head [V, d] get gradients; teacher_hidden [N, d'], teacher_head [V, d'] do
    not. weights [N] float32; tokens [N] sampled ids; scale and cap: see finish_logits. Returns the loss
    (float32 scalar) and stats without gradient: kl (the divergence), student_entropy, teacher_entropy (means
    over N, nats/token) and, given tokens, logprob [N] = log p(token)."""
    ids = torch.zeros(len(weights), dtype=torch.long, device=weights.device) if tokens is None else tokens
    loss, per_token = ChunkedDivergence.apply(student_hidden, student_head, teacher_hidden, teacher_head,
                                              weights, ids, divergence, chunk, scale, cap)
    stats = dict(zip(("kl", "student_entropy", "teacher_entropy"), per_token[:3].mean(-1)))
    return loss, stats if tokens is None else stats | dict(logprob=per_token[3])

# --------------------------------------------------------------------------------------- STUDENT AND TEACHER
# One sharded module serves both: thetabar is a second set of shards, copied into the first for one pass.
# After a forward the root's weights may still be whole: reshard() before anything reads or writes shards.

def compute_dtype():
    """Of activations, thetabar and the engine. float32 on CPU, so that tests can ask for exact agreement."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32

class SelfDistillation(nn.Module):
    """A causal LM whose forward returns hidden states or, given the teacher's, the loss. All has to happen
    inside the root's forward, whose FSDP2 hooks gather the embedding, the last norm and the head."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.logits = lm, logit_scale_and_cap(lm.config)
        self.eval()  # no dropout whatever the config says: the engine has none
        for layer in lm.get_decoder().layers:
            layer.training = True  # its own flag only: that of its checkpointing

    def forward(self, inputs, predicts, *loss_inputs, **loss_options):
        """inputs [b, T] ids, padded on the right; predicts [N] flat places that predict response tokens.
        Returns hidden states [N, d] or, given (teacher_hidden, teacher_head, weights), distill_loss's."""
        hidden = self.lm.get_decoder()(inputs, use_cache=False).last_hidden_state  # [b, T, d]; no pad is seen
        hidden = hidden.flatten(0, 1)[predicts]  # [N, d]
        if not loss_inputs:
            return hidden
        return distill_loss(hidden, self.lm.get_output_embeddings().weight, *loss_inputs, **self.logits,
                            **loss_options)

def load_model(cfg, device):
    """cfg.model in shards on all ranks: rank 0 alone reads the weights and broadcasts tensor by tensor."""
    lm = empty_model(cfg.model)
    with refusals():
        if cfg.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        whole = read_model(cfg.model, lm) if dist.get_rank() == 0 else lm
    weights = {f"{lm.base_model_prefix}.{k}": w for k, w in whole.get_decoder().state_dict().items()}
    weights["lm_head.weight"] = whole.get_output_embeddings().weight
    model = shard(SelfDistillation(lm), device).to_empty(device=device)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(lm, weights, options=options)
    for buffer, source in zip(lm.get_decoder().buffers(), whole.get_decoder().buffers()):  # rotary tables
        dist.broadcast(buffer.copy_(source), src=0)  # on other ranks source is buffer itself
    lm.generation_config = whole.generation_config  # rank 0 writes it beside the final model
    return model

def shard(model, device):
    """FSDP2, a group a decoder layer, and one of embedding, last norm and head (which keeps tied weights
    tied): shards within a node, replicas across nodes. Masters and reductions in float32."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = dist.get_world_size() // local
    mesh = dist.init_device_mesh(device.type, (nodes, local), mesh_dim_names=("replicate", "shard"))
    mesh = mesh if nodes > 1 else mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(), reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)  # it would round the tokens' weights to bfloat16
    for layer in model.lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)

def snapshot(model, dtype=None):
    """theta's shards by name, by default in the compute dtype: thetabar at the start and after a refresh."""
    model.reshard()
    return {name: p.detach().to(dtype or compute_dtype(), copy=True)
            for name, p in model.lm.named_parameters()}

@torch.no_grad()
def copy_into(model, weights):
    """Values go into the shards, where the all-gather reads them: it would not see other pointers."""
    model.reshard()
    for name, p in model.lm.named_parameters():
        p.copy_(weights[name])

def refresh(model, thetabar, step, cfg):
    """thetabar <- theta after every M steps, else thetabar as it is."""
    due = cfg.refresh_every and step % cfg.refresh_every == 0
    return snapshot(model) if due else thetabar

# -------------------------------------------------------------------------------------------------- ROLLOUTS
class Problem(NamedTuple):
    text: str  # or messages
    answer: str | None
    student: list  # token ids of the two prompts
    teacher: list

def batch_at(n, step, batch_size, seed):
    """Indices of step 0, 1, ...: slices of one permutation of range(n) after another. A pure function, so
    resuming needs no sampler. n=3, batch_size=2: step 1 takes an epoch's last and the next one's first."""
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
    """vLLM in this rank's process; `vllm_tp` consecutive ranks form one engine, the others are replicas of it
    with their own share of the batch. On a GPU it sleeps while we train: weights dropped, cache freed.
    load_format: "dummy" where `sync` brings the weights, "auto" where cfg.model's own stay (eval.py)."""

    def __init__(self, cfg, load_format="dummy"):
        say(f"starting vLLM with {cfg.model}, which takes up to some minutes ...")
        cuda, length = torch.cuda.is_available(), cfg.max_prompt_tokens + cfg.max_response_tokens
        self.tp, self.sleeps = cfg.vllm_tp, cuda and load_format == "dummy"
        ours = {"LOCAL_WORLD_SIZE": os.environ["LOCAL_WORLD_SIZE"]}
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        if not cuda:  # a cache of 1 GiB; no compiler to wait for at the first request
            defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        os.environ.update(defaults | os.environ)
        from vllm import LLM
        from vllm.model_executor.models.transformers.base import Base
        # a family without a class in vLLM: its compiler would change transformers' class, the trainer's too
        Base._decorate_for_torch_compile = lambda self: None
        self.llm = LLM(cfg.model, distributed_executor_backend="external_launcher",
                       tensor_parallel_size=cfg.vllm_tp, max_model_len=length,
                       max_num_seqs=256, max_num_batched_tokens=max(8192, length), seed=cfg.seed,
                       enable_chunked_prefill=cuda,  # on CPU it cannot rewind a request's own generator
                       load_format=load_format, enable_sleep_mode=self.sleeps, enforce_eager=not cuda,
                       gpu_memory_utilization=cfg.vllm_memory, disable_log_stats=True,
                       use_tqdm_on_load=False, dtype=engine_dtype(read_config(cfg.model)),
                       enable_prefix_caching=None if cuda else False,  # hybrids would need chunked prefill
                       hf_overrides=partial(engine_config, text_only=load_format == "dummy"))
        os.environ.update(ours)  # on CPU vLLM rewrites it
        self.llm.llm_engine.engine_core._finalizer.detach()  # its exit hook destroys our process groups too
        tokenizer, config = self.llm.get_tokenizer(), self.llm.model_config.try_get_generation_config()
        ids = config.get("eos_token_id", [])
        ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
        self.ends = ", ".join(f"{i} {tokenizer.decode([i])}" for i in sorted(ids))
        say(f"a response ends with the id {self.ends}")
        self.sleep()
        self.asleep = torch.cuda.memory_allocated()  # bytes: torch goes on counting what sleeps; 0 on CPU

    def sync(self, model):
        """theta into the engine's own tensors (CUDA graphs stay valid), a layer at a time; collective. A head
        of vLLM's own stays stale unless it is sent, tied or not."""
        model.reshard()
        has_head, = self.llm.apply_model(lambda engine: any(
            name.endswith("lm_head") for name, _ in engine.named_modules(remove_duplicate=False)))
        weights = checkpoint_weights(model.lm, self.llm.llm_engine.model_config.dtype, twins=has_head)
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # its keys and values are the old weights'

    def share(self, items):
        """This engine's share of `items`, one slice: the same on all its tensor-parallel ranks."""
        engine, engines = dist.get_rank() // self.tp, dist.get_world_size() // self.tp
        return items[engine * len(items) // engines:(engine + 1) * len(items) // engines]

    def gather(self, mine):
        """The inverse: the engines' shares -> all items in their order, on every rank."""
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
        return sum(shares[::self.tp], [])

    def stream(self, prompts, seeds, **sampling):
        """Lists of prompt ids -> (place in `prompts`, (ids, logprobs, finished)), a sample each, as they end.
        A request's own seed makes it independent of rank and neighbours. logprobs are the model's, before
        temperature. sampling: vLLM's max_tokens, temperature, top_p, top_k."""
        from vllm import SamplingParams
        params = [SamplingParams(**sampling, seed=s, logprobs=0, detokenize=False) for s in seeds]
        queued = self.llm.enqueue([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                y, at = output.outputs[0], int(output.request_id) - int(queued[0].partition("-")[0])
                logprobs = [of[token].logprob for token, of in zip(y.token_ids, y.logprobs)]
                yield at, (list(y.token_ids), logprobs, y.finish_reason == "stop")

    def generate(self, prompts, seeds, **sampling):
        """The samples of `stream`, in the order of `prompts`."""
        return [sample for _, sample in sorted(self.stream(prompts, seeds, **sampling))]

    def sleep(self):
        if self.sleeps:
            self.llm.sleep(level=2)

def sample_rollouts(engine, problems, indices, step, tokenizer, cfg):
    """A graded rollout of each problem of `indices`, in order, on every rank; the engines share the work."""
    # a rollout is a function of these: run seed, step, problem, which of its rollouts; not of the rank
    seeds = [int(digest((cfg.seed, step, i, indices[:k].count(i)))[:8], 16) for k, i in enumerate(indices)]
    mine = engine.share(indices)
    samples = engine.generate([problems[i].student for i in mine], engine.share(seeds),
                              max_tokens=cfg.max_response_tokens, temperature=cfg.temperature)
    rollouts = [Rollout(i, *sample) for i, sample in zip(mine, samples)]
    if measure:
        measure.grade_rollouts(rollouts, problems, tokenizer)
    return engine.gather(rollouts)

def keep_rollouts(rollouts, cfg):
    """The rollouts to train on, by default all: cut and wrong ones too."""
    return [r for r in rollouts if cfg.keep == "all" or r.correct]

# --------------------------------------------------------------------------------------------- TRAINING STEP
class MicroBatch(NamedTuple):
    student: tuple  # inputs [b, T] and predicts [N] of student prompt + response
    teacher: tuple  # inputs [b, T'] and predicts [N] of teacher prompt + the same response
    tokens: torch.Tensor  # [N] the responses, one after another
    weights: torch.Tensor  # [N]
    logprobs: torch.Tensor  # [N] the engine's

def token_weights(rollouts):
    """The weight of every token in the loss, a list a rollout: 1 / (B |y|), with B counted over all ranks."""
    return [[1 / (len(rollouts) * len(r.ids))] * len(r.ids) for r in rollouts]

def micro_batches(lengths, budget, rank, world):
    """Indices of `lengths` for `rank` to compute, in groups of at most `budget` padded tokens (or one
    sequence), of which at most a twentieth of the budget is padding.

    Sequences sorted by length are dealt out `world` at a time: the ranks' groups are equally many, nearly as
    wide. Lengths [9, 3, 8, 3], world 2 and budget 12 give rank 0 [[0], [1]] and rank 1 [[2], [3]]."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    deals = [order[k:k + world] for k in range(0, len(order), world)]  # a sequence a rank, the longest first
    groups = []
    for deal in deals:
        group = [*(groups[-1] if groups else []), deal]
        widths = [lengths[longest] for longest, *_ in group]
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
    lengths = [len(problems[r.index].teacher) + len(r.ids) for r in rollouts]
    packed = lambda lists: torch.tensor(sum(lists, []), device=device)
    batches = []
    for group in micro_batches(lengths, cfg.micro_batch_tokens, dist.get_rank(), dist.get_world_size()):
        ours, w = zip(*[(rollouts[i], weights[i]) for i in group]
                      or [(shortest, [0.0] * len(shortest.ids))])
        responses = [r.ids for r in ours]
        batches.append(MicroBatch(
            right_pad([problems[r.index].student for r in ours], responses, device),
            right_pad([problems[r.index].teacher for r in ours], responses, device), packed(responses),
            packed(w), packed([r.logprobs for r in ours])))
    return batches

def teacher_pass(model, thetabar, batches):
    """The teacher's last hidden states [N, d] of every micro-batch, and its head [V, d]. (Not its logits,
    which are 37 times larger for Qwen3-8B.) Afterwards theta is back, bit for bit."""
    theta = snapshot(model, torch.float32)
    copy_into(model, thetabar)
    with torch.no_grad():
        hidden = [model(*batch.teacher) for batch in batches]
    model.reshard()
    head = model.lm.get_output_embeddings().weight.detach().to(compute_dtype(), copy=True)  # kept from theta
    copy_into(model, theta)
    return hidden, head.full_tensor()

# nats/token on average, a hundredth of it in float32. Working syncs have 1e-2 and 3e-7, stale weights 0.2
MAX_GAP = 0.1

def student_pass(model, batches, hidden, head, cfg):
    """Forward and backward of every micro-batch; gradients add up. Returns the loss and means over all
    tokens. RuntimeError: engine and trainer do not agree on the tokens' log-probabilities."""
    sums, gap_max = torch.zeros(5, device=head.device), 0.0
    for batch, teacher_hidden in zip(batches, hidden):
        loss, stats = model(*batch.student, teacher_hidden, head, batch.weights, divergence=cfg.divergence,
                            chunk=cfg.loss_chunk, tokens=batch.tokens)
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the loss is a sum over them
        trained = batch.weights > 0
        n, gap = trained.sum(), ((stats["logprob"] - batch.logprobs) * trained).abs()
        entropies = stats["student_entropy"] * n, stats["teacher_entropy"] * n
        sums += torch.stack([loss.detach(), *entropies, gap.sum(), n])
        gap_max = max(gap_max, gap.max().item())
    dist.all_reduce(sums)
    loss = sums[0].item()
    student_entropy, teacher_entropy, gap = (sums[1:4] / sums[4].clamp(min=1)).tolist()
    limit = MAX_GAP if engine_dtype(model.lm.config) == torch.bfloat16 else MAX_GAP / 100
    if math.isfinite(loss) and not gap <= limit:  # nor if it is NaN
        raise RuntimeError(f"engine and trainer differ by {gap:.4f} nats/token, expected at most {limit}. "
                           "No update was made. Look, likeliest first, at the engine's kernels for this "
                           "family (on a CPU experts are packed at the first load only: README, Families), "
                           "names and tensors of checkpoint_weights, the version of vLLM (requirements.txt)")
    return dict(loss=loss, student_entropy=student_entropy, teacher_entropy=teacher_entropy, logprob_gap=gap,
                logprob_gap_max=max_over_ranks(gap_max))

def update(model, optimizer, cfg):
    """Clip, AdamW; a gradient that is not finite is dropped. Returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf).full_tensor().item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm

def train_step(model, thetabar, optimizer, rollouts, problems, device, metrics, cfg):
    """One update on `rollouts`, the same list on all ranks; fills in `metrics`."""
    batches = make_micro_batches(rollouts, problems, device, cfg)
    with timed(metrics, "teacher"):
        hidden, head = teacher_pass(model, thetabar, batches)
    with timed(metrics, "student"):
        metrics.update(student_pass(model, batches, hidden, head, cfg))
        metrics["grad_norm"] = update(model, optimizer, cfg)

# ------------------------------------------------------------------------------------------------------ MAIN
def main():
    device, cfg = start_processes(), read_arguments()
    tokenizer, problems, held_out, out = prepare(cfg)
    engine = RolloutEngine(cfg)
    model = load_model(cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    thetabar = snapshot(model)
    done = resume(out, model, optimizer, thetabar, cfg) if cfg.resume else 0
    skipped = idle = cut = 0  # steps in a row without a finite gradient, a rollout kept, one that ended
    terminated = []  # SIGTERM received: a scheduler takes the machine
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))

    for step in range(done + 1, cfg.steps + 1):
        start = time.perf_counter()
        metrics = dict(step=step, lr=optimizer.param_groups[0]["lr"],
                       teacher_age=(step - 1) % (cfg.refresh_every or cfg.steps))
        with timed(metrics, "sync"):
            engine.sync(model)
        if cfg.eval_every and (step - 1) % cfg.eval_every == 0:
            with timed(metrics, "eval"):
                metrics |= measure.validate(engine, tokenizer, held_out, cfg)
        with timed(metrics, "generate"):
            indices = batch_at(len(problems), step - 1, cfg.batch_size, cfg.seed)
            rollouts = sample_rollouts(engine, problems, indices, step, tokenizer, cfg)
            engine.sleep()
        kept = keep_rollouts(rollouts, cfg)
        if kept:
            train_step(model, thetabar, optimizer, kept, problems, device, metrics, cfg)
        thetabar = refresh(model, thetabar, step, cfg)

        skipped = 0 if math.isfinite(metrics.get("grad_norm", 0)) else skipped + 1
        idle, cut = 0 if kept else idle + 1, 0 if any(r.finished for r in rollouts) else cut + 1
        metrics |= rollout_metrics(rollouts, metrics["seconds_generate"])
        metrics |= dict(skipped_updates=skipped, peak_memory_gib=peak_memory(engine),
                        seconds_step=time.perf_counter() - start)
        log_step(out, metrics, rollouts, problems, tokenizer)
        stop_or_warn(skipped, idle, cut, engine.ends, cfg)
        leave = max_over_ranks(bool(terminated))  # all after the same step
        if leave or step % cfg.save_every == 0 or step == cfg.steps:
            save_checkpoint(out, step, model, optimizer, thetabar)
        if leave:
            say(f"stopped by SIGTERM after step {step}; --resume goes on from there")
            break
    else:  # not stopped
        export(model, tokenizer, out)
        say(f"done: {out}/model is that of step {max(done, cfg.steps)}"
            + f"; `python eval.py --model {out}/model --wrapper {cfg.wrapper}` measures it" * bool(measure))

# The algorithm ends here. What follows surrounds it: checkpoints, rows, families of models, checks, logs.

# ------------------------------------------------------------------------------------------------ CHECKPOINT
# checkpoint-K/ holds theta, Adam's state and thetabar as shards of torch.distributed.checkpoint, which any
# number of ranks can read, and state.json with every file's size. It is tmp-checkpoint-K until it is whole.

def training_state(model, optimizer, thetabar):
    model.reshard()
    fresh = not optimizer.state
    adam = dcp_state.get_optimizer_state_dict(model, optimizer)
    if fresh:  # torch has made the state by a step of zeros, which it counts
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"theta": dict(model.lm.named_parameters()), "thetabar": thetabar, "optimizer": adam}

def save_checkpoint(out, step, model, optimizer, thetabar):
    final, tmp = out / f"checkpoint-{step}", out / f"tmp-checkpoint-{step}"
    try:
        dcp.save(training_state(model, optimizer, thetabar), checkpoint_id=tmp)
    except dcp.CheckpointException:  # of any rank: a full disk
        say(f"error: {final} could not be written, with {shutil.disk_usage(out).free / 2**30:.3g} GiB free "
            "there; make room, then --resume goes on from the checkpoint before")
        raise
    if dist.get_rank() == 0:
        sizes = {path.name: path.stat().st_size for path in tmp.iterdir()}
        (tmp / "state.json").write_text(json.dumps({"sizes": sizes}))
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        for old in list(checkpoints(out).values())[2:]:
            shutil.rmtree(old)
    dist.barrier()

def checkpoints(out):
    """{step: folder} of finished checkpoints, newest first."""
    names = {path.name.removeprefix("checkpoint-"): path for path in out.glob("checkpoint-*")}
    return dict(sorted(((int(k), path) for k, path in names.items() if k.isdigit()), reverse=True))

def resume(out, model, optimizer, thetabar, cfg):
    """Fill theta, Adam's state and thetabar from the newest checkpoint whose files all have the size they had
    when they were written; returns the steps done."""
    for step, path in checkpoints(out).items():
        try:
            for name, size in json.loads((path / "state.json").read_text())["sizes"].items():
                check((path / name).stat().st_size == size, name)
        except (OSError, ValueError, KeyError) as error:
            say(f"skipping {path}, which is not whole: {error}")
            continue
        state = training_state(model, optimizer, thetabar)
        dcp.load(state, checkpoint_id=path)
        dcp_state.set_optimizer_state_dict(model, optimizer, state["optimizer"])
        optimizer.param_groups[0].update(lr=cfg.lr, weight_decay=cfg.weight_decay)  # not the checkpoint's
        break
    else:
        step, path = 0, "no checkpoint"
    say(f"--resume: {step} steps are done, from {path}"
        + f"; --steps {cfg.steps} adds none, model/ is that of step {step}" * (step >= cfg.steps))
    if dist.get_rank() == 0:
        forget_later_steps(out, step)
    return step

def export(model, tokenizer, out):
    """out/model/: theta as a plain Hugging Face model in bfloat16, gathered in rank 0's CPU memory."""
    model.reshard()
    weights = {name: w.cpu() for name, w in checkpoint_weights(model.lm, torch.bfloat16)
               if dist.get_rank() == 0}
    if dist.get_rank() == 0:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.lm.config, dtype=torch.bfloat16)
        plain.save_pretrained(out / "tmp-model", state_dict=weights, save_original_format=False)
        # as it came: save_pretrained refuses one with a temperature and without do_sample
        model.lm.generation_config.to_json_file(out / "tmp-model/generation_config.json")
        tokenizer.save_pretrained(out / "tmp-model")
        shutil.rmtree(out / "model", ignore_errors=True)
        (out / "tmp-model").rename(out / "model")
    dist.barrier()

# ------------------------------------------------------------------------------------------------------ DATA
# Strict: str() of a list, or a text cut off a conversation, would be trained on without a sign.

def load_json(text, where=""):
    with named(f"{where}expected a JSON object, found {text[:60]!r}"):
        return json.loads(text, parse_float=Decimal)  # 0.10 keeps its digits

def read_file(path):
    """(where, row) of every row of a file. All cells of a .csv are texts: 055 is not 55."""
    data, kind = Path(path).read_bytes(), Path(path.removesuffix(".gz")).suffix
    data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    if kind == ".parquet":
        import pyarrow.parquet
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        return ((f"row {n}", row) for n, row in enumerate(rows, 1))
    with named("expected the encoding UTF-8"):
        text = data.decode("utf-8-sig")
    if kind == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return ((f"line {table.line_num}", row) for row in table)
    if text.lstrip().startswith("["):
        return ((f"row {n}", row) for n, row in enumerate(load_json(text), 1))
    lines = enumerate(text.split("\n"), 1)  # splitlines() also cuts at U+2028
    return ((f"line {n}", load_json(line, f"line {n}, ")) for n, line in lines if line.strip())

def read_rows(source):
    """(where, row) of every row of a file, a folder of files, or a data set of the hub; `where` names it."""
    if re.search(r"\.(jsonl?|csv|parquet)(\.gz)?$", source) and not Path(source).is_dir():
        with named(source):
            for where, row in read_file(source):
                check(isinstance(row, dict) and None not in row,
                      f"{where}: expected a JSON object, or a cell for each column, found {str(row):.60}")
                yield f"{source}, {where}", row
        return
    import datasets
    name, config, split = [*([source] if Path(source).exists() else source.rsplit(":", 2)), "", ""][:3]
    with named(f"{source}: expected a file .jsonl, .json, .csv or .parquet, or .gz of one, a folder of "
               "these, or a data set of the hub as ID, ID:CONFIG or ID:CONFIG:SPLIT, found"):
        if Path(name).is_dir():  # datasets knows which files are the split's
            files = datasets.load_dataset_builder(name, config or None).config.data_files[split or "train"]
            rows = (pair for file in files for pair in read_rows(file))
        else:
            data = datasets.load_dataset(name, config or None, split=split or "train")
            rows = ((f"{source}, row {n}", row) for n, row in enumerate(data, 1))
    yield from rows

def as_problem(value, wrapper):
    """A prompt as the text of its only turn, else as messages; None if no user's text is in it. For --wrapper
    math it holds one problem, whose wrapper is taken off."""
    if isinstance(value, str):
        is_chat = re.fullmatch(r"(?s)\[?\s*\{.*[\"'](role|from)[\"']\s*:.*\}\s*\]?", value.strip())
        value = load_json(value) if is_chat else [{"role": "user", "content": value}]
    value = [] if value is None else value
    is_turn = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and (
        isinstance(m.get("content"), str) or m.get("tool_calls"))
    check(isinstance(value, list) and all(map(is_turn, value)),
          f"expected a text, or messages with the texts role and content, found {value!r:.60}")
    json.dumps(value, ensure_ascii=False, default=float).encode()  # fails on half a surrogate pair
    roles = [m["role"] for m in value]
    check(roles[-1:] != ["assistant"] and (wrapper == "none" or roles.count("user") < 2),
          "expected the user's turn last, and with --wrapper math no other of theirs (--wrapper none takes a "
          f"conversation as it is), found the turns {', '.join(roles)}")
    if not any(m["role"] == "user" and m["content"].strip() for m in value):
        return None
    if wrapper == "math":
        bare = lambda text: text.strip().removeprefix(WRAPPER_HEAD).removesuffix(WRAPPER_TAIL).strip()
        value = edit_last_user(value, bare)
    return value[0]["content"] if len(value) == 1 else value

def read_problem(row, where, wrapper="math"):
    """The problem of a row, a text or messages; ValueErrors say `where`. For --wrapper math
    {"prompt": [{"role": "user", "content": WRAPPER_HEAD + "1+1?" + WRAPPER_TAIL}]} gives "1+1?"."""
    for key in ("problem", "prompt", "question"):
        with named(f"{where}, field {key}"):
            problem = as_problem(row.get(key), wrapper)
        if problem:
            return problem
    raise ValueError(f"{where}: expected a field problem, prompt or question, found {', '.join(row)}; a "
                     "blank one is none")

def load_problems(cfg, tokenizer, instruction):
    """The data set in its own order, without duplicates and without problems whose prompts are too long."""
    say(f"reading {cfg.data} ...")
    answers, rows, contradictions = {}, 0, 0
    for rows, (where, row) in enumerate(read_rows(cfg.data), 1):
        key = json.dumps(read_problem(row, where, cfg.wrapper), default=float)  # a conversation is no key
        answer = measure and measure.read_answer(row, where)
        first = answers.setdefault(key, answer)
        contradictions += None not in (first, answer) and first != answer
        answers[key] = first or answer
    problems = [Problem(text, answer, student_prompt(tokenizer, text, cfg.thinking, cfg.wrapper),
                        teacher_prompt(tokenizer, text, instruction, cfg.thinking, cfg.wrapper))
                for text, answer in zip(map(json.loads, answers), answers.values())]
    short = [p for p in problems if max(len(p.student), len(p.teacher)) <= cfg.max_prompt_tokens]
    unknown = sum(p.answer is None for p in short)
    say(f"data: {rows} rows, {rows - len(problems)} duplicates ({contradictions} with another answer, the "
        f"first counts), {len(problems) - len(short)} dropped (a prompt longer than {cfg.max_prompt_tokens} "
        f"tokens), {len(short)} left, {unknown} of them without an answer; {cfg.steps} steps are "
        f"{cfg.steps * cfg.batch_size / max(1, len(short)):.2f} epochs")
    check(short, f"--data {cfg.data}: expected problems, found {len(problems)}, none with prompts of at most "
          f"{cfg.max_prompt_tokens} tokens; add problems or raise --max_prompt_tokens")
    check(cfg.keep == "all" or not unknown, f"--keep correct: {unknown} of the {len(short)} problems have no "
          "answer; expected a field answer, solution or reward_model.ground_truth")
    return short

# -------------------------------------------------------------------------------------------------- FAMILIES
# How families of models differ, all of it, and which cannot be trained.

read_config = partial(AutoConfig.from_pretrained, trust_remote_code=False)  # else it asks on the terminal

def text_config(config):
    """Of a multimodal model the causal text model's: that is what is trained, run and exported."""
    text = config.get_text_config()
    if text is not config:
        text.architectures = [CAUSAL_LMS[text.model_type]]
    if getattr(text, "attn_logit_softcapping", None):
        text._attn_implementation = "eager"  # sdpa leaves this soft cap out, silently
    return text

def engine_config(config, text_only):
    """vLLM's view of the config: logits in float32, windows and the queries' scale as the trainer's."""
    config = text_config(config) if text_only else config
    text = config.get_text_config()
    text.head_dtype = config.head_dtype = "float32"
    if text.model_type.startswith("cohere2"):
        text.sliding_window -= 1  # vLLM adds one to it, transformers does not
    rope = getattr(text, "rope_parameters", None) or {}
    if "llama_4_scaling_beta" in rope:  # of Ministral 3's queries; vLLM has another name for it
        text.llama_4_scaling = rope | dict(beta=rope["llama_4_scaling_beta"])
    return config

def logit_scale_and_cap(config):
    """For finish_logits; read_model sees whether that is all."""
    of = lambda name: getattr(config.get_text_config(), name, None) or 1
    return dict(scale=of("logit_scale") * of("lm_head_multiplier") / of("logits_scaling"),
                cap=getattr(config.get_text_config(), "final_logit_softcapping", None))

def engine_dtype(config):
    """The compute dtype, but for gated delta-nets, whose kernels know bfloat16 only."""
    delta_net = hasattr(config.get_text_config(), "linear_key_head_dim")
    return torch.bfloat16 if delta_net else compute_dtype()

def empty_model(model):
    """The text model of `model`, hub id or folder, on the meta device: no weights are read."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text_config(read_config(model)), dtype=torch.float32)

def read_model(model, lm):
    """`model` with its weights, in memory. ValueError: some are missing, or the loss has other logits."""
    known = read_config(model).model_type in CAUSAL_LMS
    whole, info = (AutoModelForCausalLM if known else AutoModelForMultimodalLM).from_pretrained(
        model, dtype=lm.dtype, attn_implementation=lm.config._attn_implementation, output_loading_info=True)
    missing, tied = sorted(info["missing_keys"]), bool(lm.all_tied_weights_keys)
    check(not missing, f"--model {model}: expected weights {missing[:3]}, found none in its files")
    check(tied == bool(whole.all_tied_weights_keys), f"--model {model}: expected embedding and head to be "
          "one, as config.json says, found two tensors; set its tie_word_embeddings to false")
    check(all(w.isfinite().all() for w in whole.state_dict().values()),
          f"--model {model}: expected finite weights, found NaN or infinity; take another copy")
    ids, longer = torch.arange(8), torch.arange(12)[None]  # later tokens may not change earlier logits
    with torch.no_grad():
        own, best = whole.eval()(ids[None], use_cache=False).logits[0].log_softmax(-1).max(-1)
        student, head = SelfDistillation(whole), whole.get_output_embeddings().weight
        _, stats = student(longer, ids, student(longer, ids), head, torch.ones(8), tokens=best)
    error = (stats["logprob"] - own).abs().max().item()
    check(error <= 1e-3, f"--model {model}: expected the loss to compute the model's own log-probabilities, "
          f"found {error:.1g} nats between them; logit_scale_and_cap is not all, or tokens see later ones")
    return whole

def checkpoint_weights(lm, dtype, twins=False):
    """(name, whole tensor) as in a checkpoint, where e.g. experts are not fused. Collective. A layer at a
    time: what falls apart or comes together lies in one. Tied ones once, or twins: under both names."""
    tied, layer_of = lm.all_tied_weights_keys, lambda item: re.sub(r"(\.\d+\.).*", r"\1", item[0])
    for _, layer in itertools.groupby(lm.state_dict(keep_vars=True).items(), layer_of):
        weights = {name: p.detach().to(dtype) for name, p in layer if name not in tied}
        whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
        for name, w in revert_weight_conversion(lm, whole).items():
            yield name, w
            yield from ((twin, w) for twin, source in tied.items() if twins and source == name)

def check_family(model, length):
    """ValueError for what cannot be trained, on `length` tokens, before any weights are read; else its number
    of parameters."""
    config = read_config(model)
    text, kind = config.get_text_config(), (config.architectures or ["?"])[0]
    rope, name = getattr(text, "rope_parameters", None) or {}, CAUSAL_LMS.get(text.model_type, "")
    context = rope.get("original_max_position_embeddings", length)
    faults = {
        f"{kind} of type {text.model_type}; take a ...ForCausalLM": config.is_encoder_decoder or not (
            name.endswith("ForCausalLM") and kind.endswith(("ForCausalLM", "ForConditionalGeneration"))),
        "an embedding model; take one that generates": has_file(model, "modules.json"),
        "quantised weights; take the model they were made from": any(
            getattr(c, "quantization_config", None) for c in (config, text)),
        "two-way attention; take another": getattr(text, "use_bidirectional_attention", 0) in (True, "all"),
        f"LongRoPE and {length} tokens, where it changes at {context}; lower --max_prompt_tokens or "
        "--max_response_tokens": rope.get("rope_type") == "longrope" and length > context,
        "Qwen3.5, for which vLLM imports torchvision; install that":
            "qwen3_5" in text.model_type and not importlib.util.find_spec("torchvision")}
    for fault, found in faults.items():
        check(not found, f"--model {model}: expected a causal language model in plain weights, found {fault}")
    lm = empty_model(model)
    check(hasattr(lm.get_decoder(), "layers") and hasattr(lm, "lm_head") and lm.lm_head.bias is None,
          f"--model {model}: expected .layers and a head without a bias, found {name}; take another family")
    if text is not config:
        with torch.device("meta"), named(f"--model {model}: expected a class that transformers can make"):
            AutoModelForMultimodalLM.from_config(config)
        say(f"{model} is multimodal: its text model alone is trained, and exported as a {name}")
    return sum(p.numel() for p in lm.parameters())

# ---------------------------------------------------------------------------------------------------- CHECKS
# What can be wrong with the arguments is found before any weights load: expected, found, what to change.

def check(condition, message):
    if not condition:
        raise ValueError(message)

@contextlib.contextmanager
def named(where):
    """An error inside, whatever library's, becomes a ValueError that says `where`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: " + str(error).strip().partition("\n")[0]) from None

@contextlib.contextmanager
def refusals():
    """Around the checks: an error of any rank ends all with status 1, after rank 0 has said it in one line.
    Nothing collective inside: ranks without an error would wait in it for the one that has."""
    error, errors = None, [None] * dist.get_world_size()
    try:
        yield
    except (ValueError, OSError) as found:
        error = " ".join(str(found).split())
    dist.all_gather_object(errors, error)
    if any(errors):
        say(f"error: {next(filter(None, errors))}")
        dist.barrier()  # rank 0 has spoken before the launcher stops it
        sys.exit(1)

def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

def load_tokenizer(model):
    """(tokenizer, context length in tokens) of a model; needs no weights."""
    files = [path.name for path in Path(model).glob("*")]  # none of a hub id
    expected = f"--model {model}: expected a folder with a chat model, or the id of one on the hub, found"
    check("adapter_config.json" not in files, f"{expected} a LoRA adapter; merge it into its base model "
          "(peft: merge_and_unload) and save that")
    with named(f"{expected} {'another' if files else 'no such'} folder"):
        config = read_config(model)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    check(tokenizer.chat_template, f"{expected} no chat template; save a tokenizer with one there")
    check(not files or any(name.endswith((".safetensors", ".bin")) for name in files),
          f"{expected} no weights, .safetensors or .bin; copy them there")
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", math.inf)

def check_ranks(tp):
    """Number of engines, `tp` ranks each. Without its driver torch for CUDA would run on the CPU, unsaid."""
    driver, world = Path("/proc/driver/nvidia/version"), dist.get_world_size()
    found = driver.read_text().splitlines()[0] if driver.exists() else "none"
    check(torch.cuda.is_available() or not torch.version.cuda, f"torch for CUDA {torch.version.cuda} sees no "
          f"GPU: expected a driver R580 or newer, found {found}; update it, or take the README's CPU builds")
    check(world % tp == 0, f"--vllm_tp {tp}: expected a number of ranks that it divides, found {world}; "
          "start more with torchrun --nproc_per_node, or lower it")
    return world // tp

def check_range(name, value, range):
    """`range` as in Config. Infinity and NaN are in none."""
    low, _, high = range.partition("..")
    check(float(low) <= value <= float(high or sys.float_info.max),
          f"--{name} {value}: expected at least {low}" + (f" and at most {high}" if high else ""))

def check_settings(cfg, context):
    for f in fields(cfg):
        if "metavar" in f.metadata:
            check_range(f.name, getattr(cfg, f.name), f.metadata["metavar"])
    engines, out = check_ranks(cfg.vllm_tp), Path(cfg.out)
    length = cfg.max_prompt_tokens + cfg.max_response_tokens
    check(cfg.batch_size % engines == 0,
          f"--batch_size {cfg.batch_size} is not divisible by the {engines} engines; take a multiple")
    check(length <= context, f"--max_prompt_tokens + --max_response_tokens = {length} is more than the "
          f"model's context of {context}; lower one (a resumed run needs its options again)")
    check(cfg.resume and (out / "config.json").exists() or not (checkpoints(out) or (out / "model").exists()),
          f"--out {out} holds a run (or a model) already; add --resume to its command (config.json has "
          "its options) to go on with it, or name another")
    check(importlib.util.find_spec("vllm"), "vllm is not installed: on a machine with GPUs `pip install -r "
          "requirements.txt`, on one without as in the README")
    check(measure or cfg.keep == "all" and not cfg.eval_every,
          f"--keep correct and --eval_every need eval.py, which grades, beside {__file__}; copy it there")

def check_disk(cfg, parameters):
    """Two checkpoints are kept while a third is written: theta and Adam's state in float32, thetabar."""
    each, out = (12 + compute_dtype().itemsize) * parameters, Path(cfg.out).absolute()
    needed = each * (min(3, math.ceil(cfg.steps / cfg.save_every)) - len(checkpoints(out)))
    free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    free += sum(path.stat().st_size for path in out.glob("tmp-*/*"))  # half written: start_run removes them
    check(needed <= free, f"--out {cfg.out}: expected {needed / 1e9:.3g} GB free for "
          f"checkpoints of {each / 1e9:.3g} GB, found {free / 1e9:.3g}; make room, or name another folder")

# What makes two runs different ones: --resume needs these as they were. All else may change, and is said.
IDENTITY = ("model", "template", "instruction", "wrapper", "thinking", "problems", "batch_size", "seed",
            "keep", "divergence", "refresh_every")

def real_path(model):
    return os.path.realpath(model) if Path(model).exists() else model  # an id of the hub

def compare_settings(old, new):
    for name in new:
        if name != "resume" and old.get(name, new[name]) != new[name]:
            change = f"the run has {name} {old[name]!r}, found {new[name]!r}"
            check(name not in IDENTITY, f"--resume: {change}; give the same, or another --out")
            say(f"--resume: {change}; going on with the latter")

def start_run(out, settings):
    """The folder, without what a run that died left half done, and its config.json."""
    with named(f"--out {out}, expected a folder to write to"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "tmp-config").write_text(json.dumps(settings, indent=1))
        (out / "tmp-config").rename(out / "config.json")
        for left in out.glob("tmp-*"):
            shutil.rmtree(left, ignore_errors=True)
        forget_later_steps(out, math.inf if checkpoints(out) else 0)

def read_arguments():
    parser = HfArgumentParser(Config)
    # a line instead of the usage; argparse takes -1e-6 for an option and has no value then
    parser.error = lambda message: check(False, f"{message}; --help has each option's range")
    with refusals():
        cfg, stray = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        check(not stray, f"expected options as in --help, found {' '.join(stray)}")
    return cfg

def prepare(cfg):
    """All checks -> tokenizer, problems to train and evaluate on, the run's folder; or exit status 1."""
    out = Path(cfg.out)
    with refusals():
        instruction, (tokenizer, context) = read_instruction(cfg.instruction), load_tokenizer(cfg.model)
        check_settings(cfg, context)
        check_disk(cfg, check_family(cfg.model, cfg.max_prompt_tokens + cfg.max_response_tokens))
        with named(f"{out}/config.json, expected the settings of the run there"):  # {}: nothing to go on with
            old = dict(json.loads((out / "config.json").read_text())) if checkpoints(out) else {}
        day = old.get("date", date.today().isoformat())
        fix_date(tokenizer, day)
        problems = load_problems(cfg, tokenizer, instruction)
        held_out = measure.load_held_out(cfg, tokenizer) if cfg.eval_every else []
        settings = asdict(cfg) | dict(
            model=real_path(cfg.model), instruction=instruction, template=digest(tokenizer.chat_template),
            date=day, problems=digest([(p.text, p.answer) for p in problems]), torch=torch.__version__,
            code=digest(Path(__file__).read_bytes()))
        compare_settings(old, settings)
    with refusals():  # all have read before one writes
        if dist.get_rank() == 0:
            start_run(out, settings)
    first = problems[0]
    say_prompts(tokenizer, cfg.thinking, instruction, student=first.student, teacher=first.teacher)
    if not measure:
        say(f"no eval.py beside {__file__}: rollouts are not graded, the metrics have no accuracy")
    return tokenizer, problems, held_out, out

# ------------------------------------------------------------------------------------------------------ LOGS
def say(text):
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)

def say_prompts(tokenizer, thinking, instruction, **prompts):
    """What shows, before it starts, that a run is not the one meant: c, and both ends of prompts by name."""
    say(f"c: {instruction}")
    for name, ids in prompts.items():
        text = tokenizer.decode(ids)
        say(f"the first {name}'s prompt: {text[:160]!r} ... {text[-120:]!r}")
    if not thinking and chat_ids(tokenizer, "x", True) == chat_ids(tokenizer, "x", False):
        say("--no_thinking changes nothing: the model's chat template has no enable_thinking")

@contextlib.contextmanager
def timed(metrics, name):
    """metrics["seconds_NAME"]: what the block took, the GPU's queue included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    metrics[f"seconds_{name}"] = time.perf_counter() - start

def max_over_ranks(value):  # collective
    value = torch.tensor(float(value))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()

def rollout_metrics(rollouts, seconds):
    lengths = [len(r.ids) for r in rollouts]
    known = [r.correct for r in rollouts if r.correct is not None]
    found = dict(response_tokens=fmean(lengths), response_tokens_min=min(lengths),
                 response_tokens_max=max(lengths), truncated=fmean(not r.finished for r in rollouts),
                 tokens_per_second=sum(lengths) / seconds)
    return found | dict(accuracy=fmean(known)) if known else found

def peak_memory(engine):
    """GiB of the rank that took most: of its GPU on top of the engine asleep, on a CPU of its process."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max_over_ranks((torch.cuda.max_memory_allocated() - engine.asleep) or process) / 2**30

def stop_or_warn(skipped, idle, cut, ends, cfg):
    """After so many steps in a row without a finite gradient, a rollout kept, one that ended."""
    if cut == 1:
        say(f"warning: all rollouts were cut at {cfg.max_response_tokens} tokens: do the model's turns end "
            f"with {ends}? If not, correct its generation_config.json")
    if idle == 3:
        say("warning: no rollout was kept in three steps, nothing is trained: are the data's answers plain "
            "values, and is there one in the responses (samples.jsonl)?")
    if idle == 10:
        raise RuntimeError("no rollout was kept in ten steps; the checkpoints are as they were")
    if skipped == 3:
        raise RuntimeError("three gradients in a row were not finite; the checkpoints are as they were")

CONSOLE = dict(
    step="step {:4d}", loss="loss {:8.5f}", grad_norm="grad {:7.3f}", response_tokens="tokens {:7.1f}",
    truncated="cut {:4.0%}", accuracy="right {:6.1%}", student_entropy="entropy {:.3f}",
    logprob_gap="gap {:.1e}", teacher_age="age {:2d}", seconds_step="{:6.1f} s",
    tokens_per_second="{:6.0f} tok/s", peak_memory_gib="{:5.1f} GiB", eval_accuracy="eval {:6.1%}",
    eval_tokens="at {:.0f} tokens")

def log_step(out, metrics, rollouts, problems, tokenizer):
    """A line of metrics.jsonl, four of samples.jsonl, one on the console."""
    if dist.get_rank() != 0:
        return
    metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    samples = [dict(step=metrics["step"], problem=problems[r.index].text, response=tokenizer.decode(r.ids),
                    answer=problems[r.index].answer, correct=r.correct, finished=r.finished)
               for r in rollouts[:4]]
    for name, rows in (("samples.jsonl", samples), ("metrics.jsonl", [metrics])):
        with open(out / name, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    say("  ".join(form.format(metrics[k]) for k, form in CONSOLE.items() if metrics.get(k) is not None))

def forget_later_steps(out, step):
    """Cut what came after `step`, and a line half written, off the logs: the resumed run writes it again."""
    for path in (out / "metrics.jsonl", out / "samples.jsonl"):
        if path.exists():
            lines = [line for line in open(path) if line.endswith("}\n") and json.loads(line)["step"] <= step]
            (out / "tmp-log").write_text("".join(lines))
            (out / "tmp-log").rename(path)

# ------------------------------------------------------------------------------------------------- PROCESSES
def start_processes():
    """Join torchrun's process group, or make one of a single rank; returns this rank's device."""
    os.environ.update(dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
                           MASTER_ADDR="127.0.0.1", MASTER_PORT="0") | os.environ)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    disable_progress_bar()  # in a log file bars are noise
    return device

def run_and_exit(main):
    """main(), and the process is gone, its own error the last on the screen: Python's exit would call vLLM's
    and NCCL's, which wait for ranks that may have failed, and complain about an engine asleep."""
    status = 1
    try:
        main()
        status = 0
    except SystemExit:
        if "vllm" not in sys.modules:  # no engine yet: as ever
            raise
    except BaseException:  # KeyboardInterrupt and torch's CheckpointException are no Exceptions
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(status)

if __name__ == "__main__":
    run_and_exit(main)
