"""OPSDC: On-Policy Self-Distillation for Reasoning Compression (arXiv 2603.05433), all of it in one file.

A reasoning model that is told "be concise" reasons in fewer tokens. OPSDC teaches it to do so without being
told. The model samples responses without the instruction. At every token of them it learns to predict what it
would predict with the instruction in its prompt. So there is one model with two prompts, and there are no
answers, no rewards and no length budget.

    x        a problem                         y        the student's response, y_t its t-th token
    c        the conciseness instruction       V, d     vocabulary size, hidden size
    student  p = pi_theta(. | x, y_<t)         gets the gradient
    teacher  q = pi_thetabar(. | x, c, y_<t)   the same network with older weights thetabar, no gradient

    for step = 1 .. steps:
        x_1..x_B ~ D                           # B = 32 problems, one rollout each
        y_i ~ pi_theta(. | x_i)                # vLLM, temperature 1, at most 8192 tokens, truncated ones kept
        loss = 1/B sum_i 1/|y_i| sum_t KL(p || q)      # y held fixed; exact over the vocabulary, in nats
        theta <- AdamW(theta, grad loss)       # lr 1e-6 constant, weight decay 0.01, gradient clipped at 1.0
        every M = 50 steps: thetabar <- theta  # the refresh

One process, called a rank, runs on each GPU. Every weight is cut into shards, one for each rank. A rank
stores only its own shards: of theta and Adam's state in float32, and of thetabar. To compute a layer for its
own sequences, a rank briefly gathers the whole weights of that layer. In backward the ranks' gradients are
averaged, and each keeps those of its shards. FSDP2 does this in operations that all ranks have to join
(collectives). The process also runs a vLLM engine, or with --vllm_tp a part of one. A step copies theta into
the engine in place and samples the rollouts. It then swaps thetabar's shards into the training module for one
pass, which keeps the teacher's last hidden states. Finally it swaps theta back and trains it.

The axes of tensors are B sequences of a batch, b of a micro-batch, T positions, N response tokens of a
micro-batch (concatenated without padding) or n of them, V and d.

Left out on purpose: rewards and advantages; importance ratios (the loss sums over all next tokens instead of
using the sampled one, so it needs none); LoRA; learning rate schedules; several rollouts of a prompt;
asynchronous rollouts. The README says which forks add them.

This file differs from the authors' code (A) or from the text of the paper (P) as follows.
 1. Logits are float32 whatever the model's dtype. A's bfloat16 drowns the small KL (see THE OBJECTIVE).
 2. A token weighs 1 / (B |y|), as in P, however the batch is divided into micro-batches.
 3. The sampled token ids are trained on. A tokenises the responses' text again, and has the line "Remember to
    put your answer ..." twice in the teacher's prompt.
 4. thetabar is part of the checkpoint, so that --resume goes on as if the run had not stopped.
 5. The text that the data set puts around each problem is stripped. The student's prompt puts it back, the
    teacher's puts another there (P leaves it in both). Problems with long prompts are dropped.
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
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer,
                          HfArgumentParser)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import _get_resolved_checkpoint_files as find_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.utils import cached_file

# eval.py, beside this file, reads the problems and grades the responses; a fork may bring its own. These of
# its helpers are used throughout: say(text) prints on rank 0; from_rank_0(f, *arguments) calls f on rank 0
# only and returns its result on every rank; check(condition, message) raises ValueError(message) unless the
# condition holds; inside `with blaming("X: found"):` an error, such as that of check(False, "NaN"), becomes
# ValueError("X: found: NaN"). The next line is for `python -P`, which does not search this folder.
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
    """All settings; the defaults are the paper's. --batch_size and --batch-size are the same option."""
    model: str = setting("Qwen/Qwen3-8B", "hub id or folder of a causal language model with a chat template")
    data: str = setting("BytedTsinghua-SIA/DAPO-Math-17k", "hub ID[:CONFIG[:SPLIT]], file or folder of files")
    out: str = setting("out", "folder for logs, checkpoints and the trained model; new unless --resume")
    instruction: str = setting("v1", "c: v1, v2, 20%%, 50%% or 80%% (fewer tokens), @FILE or the text itself")
    wrapper: Literal["math", "none"] = setting("math", "math: DAPO's text around each problem; none: no text")
    steps: int = setting(100, "number of updates")
    batch_size: int = setting(32, "B: problems in a step, one rollout each, over all ranks")
    lr: float = setting(1e-6, "AdamW's learning rate, constant")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    clip: float = setting(1.0, "gradients are clipped to this norm; 0 = no clipping")
    temperature: float = setting(1.0, "sampling temperature of the rollouts")
    max_prompt_tokens: int = setting(1024, "problems with a longer prompt are dropped")
    max_response_tokens: int = setting(8192, "longer rollouts are truncated, and trained on like the others")
    refresh_every: int = setting(50, "M: thetabar <- theta every M steps; 0 = frozen teacher")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = setting("reverse_kl", "the others are ablations")
    keep: Literal["all", "correct"] = setting("all", "rollouts to train on; correct ones need known answers")
    micro_batch_tokens: int = setting(16384, "a rank's padded tokens in a pass; for memory, not results")
    loss_chunk: int = setting(1024 if torch.cuda.is_available() else 256, "tokens whose logits exist at once")
    gradient_checkpointing: bool = setting(True, "recompute activations in backward: less memory, more time")
    replicas: int = setting(1, "number of whole copies of the model (HSDP); 1: it is sharded over all ranks")
    vllm_tp: int = setting(1, "ranks that share one vLLM engine (tensor parallelism)")
    vllm_memory: float = setting(0.5, "share of each GPU's memory for vLLM while it generates")
    save_every: int = setting(10, "steps between checkpoints; the newest two are kept")
    export_every: int = setting(0, "steps between exports to model-K/ during training; 0 = only at the end")
    resume: bool = setting(False, "continue from the newest checkpoint in --out")
    seed: int = setting(0, "determines the order of the problems and the sampling")
    thinking: bool = setting(True, "the chat template's enable_thinking (--no_thinking switches it off)")

# --------------------------------------------------------------------------------------------------- PROMPTS
# Student and teacher see the same problem. Where the student's prompt says "Solve the following math problem
# step by step", the teacher's has the instruction. These strings are the experiment itself.
FORMAT = ("The last line of your response should be of the form Answer: $Answer (without quotes) "
          "where $Answer is the answer to the problem.")
# What stands around the problem in every row of DAPO-Math-17k, and in the student's prompt
STUDENT_PREFIX = f"Solve the following math problem step by step. {FORMAT}\n\n"
TEACHER_PREFIX = f"{FORMAT}\n\n"  # after the instruction
SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'  # after the problem, in both
WRAPPERS = {"math": (STUDENT_PREFIX, SUFFIX), "none": ("", "")}  # the choices of --wrapper

INSTRUCTIONS = {  # v1 and v2 are the paper's, word for word
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
    """The token ids of the student's prompt or, given the text of c as `instruction`, of the teacher's. If
    `problem` is a list of messages, the last user turn is wrapped. ValueError if the template fails."""
    prefix, suffix = WRAPPERS[wrapper]
    if instruction is not None:
        prefix = f"{instruction}\n\n{TEACHER_PREFIX}" if wrapper == "math" else f"{instruction}\n\n"
    messages = problem if isinstance(problem, list) else [{"role": "user", "content": problem}]

    def wrap(text):
        return prefix + text + suffix
    messages = evaluator.edit_last_user(messages, wrap)
    with evaluator.blaming(f"the model's chat template fails on {str(problem):.80}"):
        evaluator.check(not tools or "tools" in str(tokenizer.chat_template), "it has no place for tools")
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                             return_dict=False, tools=tools, enable_thinking=thinking)

# --------------------------------------------------------------------------------------------- THE OBJECTIVE
# loss = sum over tokens of w KL(p || q), w = 1 / (B |y|). With the student's logits s and a = log p - log q:
#     KL = sum_v p_v a_v = sum_v p_v (exp(-a_v) - 1 + a_v)
#     dKL/ds_v = p_v (a_v - sum_u p_u a_u)
# The two sums are equal because p_v exp(-a_v) = q_v, and p and q each sum to 1. We compute the right one. It
# has the form of the k3 estimator, r - 1 - log r with r = q / p = exp(-a), but summed over the whole
# vocabulary instead of sampled. None of its terms is negative. The terms of the left sum have both signs and
# cancel to second order, which in float32 leaves a relative error of 1.5e-4 at a KL of 1e-4 nats/token.
# Logits are float32 even if hidden states and heads are bfloat16: at a KL of 0.0017 nats/token, bfloat16
# logits cause an error of 57 % in the loss and of 54 % in the head's gradient (README, The objective).

def kl_divergence(p, q, a):
    """KL(p || q) [n] in nats, given a = log p - log q [n, V]. Both forms below equal p (exp(-a) - 1 + a). In
    the first, expm1 keeps the digits that exp(-a) - 1 would lose near a = 0, but it overflows below a = -88.
    The second has no exponential. Any threshold from -80 to -1 would do."""
    near = p * (torch.expm1(-a) + a)
    far = torch.addcmul(q - p, p, a)  # q - p + p a
    return torch.where(a > -1, near, far).sum(-1)

def divergence_and_gradient(p, log_p, q, log_q, kind):
    """Given the distributions of student (p) and teacher (q) [n, V], returns the divergence D [n] in nats and
    its gradient dD/ds [n, V] with respect to the student's logits s."""
    a = log_p - log_q
    if kind == "forward_kl":  # KL(q || p)
        return kl_divergence(q, p, -a), p - q
    if kind == "reverse_kl":
        value = kl_divergence(p, q, a)
    else:  # jsd: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2
        m = (p + q) / 2
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = (kl_divergence(p, m, log_p - log_m) + kl_divergence(q, m, log_q - log_m)) / 2
        a = (log_p - log_m) / 2
    # For reverse_kl and jsd, a_v is dD/dp_v up to a constant, which cancels here.
    return value, p * (a - (p * a).sum(-1, keepdim=True))

def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher) of each row, in nats, float32: [N, V], [N, V] -> [N]. For tests and forks, but
    not for autograd: where a < -88, the branch that kl_divergence does not take has a gradient of NaN."""
    log_p, log_q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return divergence_and_gradient(log_p.exp(), log_p, log_q.exp(), log_q, "reverse_kl")[0]

def finish_logits(raw, scale, softcap):
    """Returns (logits, d(logits)/d(raw)) of raw = h W^T [n, V]. With a softcap these are softcap * tanh(scale
    * raw / softcap) and its slope, otherwise scale * raw and scale. Overwrites raw with scale * raw."""
    logits = raw if scale == 1 else raw.mul_(scale)
    if softcap is None:
        return logits, scale
    # 1 - tanh^2 in place of 1 / cosh^2 would lose digits by cancellation.
    return softcap * torch.tanh(logits / softcap), scale / torch.cosh(logits / softcap) ** 2

def float32_product(a, b, out, add=False):
    """Writes a [n, k] @ b [k, m] to `out` [n, m], or adds it; summed in float32. On a GPU, if b is bfloat16,
    a is rounded to it too. For logits, a holds hidden states, which are bfloat16 already. For gradients, a is
    d(loss)/d(logits): its rounding changes the result by 0.17 %, as much as rounding the result would."""
    if b.is_cuda and b.dtype == torch.bfloat16:
        return torch.addmm(out, a.bfloat16(), b, beta=int(add), out_dtype=torch.float32, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)  # with beta 0, `out` is not read

# How many logits a softmax takes at a time: few enough for a CPU's cache, or enough to keep a GPU busy.
BLOCK = dict(cpu=620_000, cuda=10_000_000)

def split_together(size, *tensors):  # like zip, but in slices of `size` rows; the slices are views
    return zip(*[x.split(size) for x in tensors])

def divergence_in_place(raw, teacher_raw, weights, ids, kind, scale, softcap):
    """Returns [5, n]: for each of n tokens the five numbers listed in chunked_divergence. Overwrites `raw`
    [n, V], the product of hidden states and head, with the gradient of the loss with respect to it."""
    logits, derivative = finish_logits(raw, scale, softcap)
    teacher_logits, _ = finish_logits(teacher_raw, scale, softcap)
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    divergence, gradient = divergence_and_gradient(p, log_p, q, log_q, kind)
    student_entropy, teacher_entropy = -(p * log_p).sum(-1), -(q * log_q).sum(-1)
    logprob = log_p.gather(-1, ids[:, None])[:, 0]
    # a fork multiplies `weights` here by factors of the entropies or divergence, as constants
    torch.mul(gradient, weights[:, None] * derivative, out=raw)  # d(loss)/d(raw), by the chain rule
    return torch.stack([divergence, student_entropy, teacher_entropy, logprob, weights])

@torch.no_grad()
def chunked_divergence(student_hidden, student_head, teacher_hidden, teacher_head, weights, ids, kind, chunk,
                       scale, softcap):
    """Goes through the N tokens once. Returns the loss's gradients with respect to student_hidden [N, d] and
    student_head [V, d] and, for each token [5, N], its divergence, the student's and the teacher's entropy,
    the student's log-probability of its id, and its weight; all in float32. Logits exist for `chunk` tokens
    at a time, and their gradients take their place."""
    (N, d), V = student_hidden.shape, len(student_head)
    new = partial(torch.empty, device=student_head.device, dtype=torch.float32)
    grad_hidden, grad_head = new(N, d), new(V, d).zero_()
    student_buffer, teacher_buffer = new(min(chunk, N), V), new(min(chunk, N), V)
    rows = max(1, BLOCK[student_head.device.type] // V)
    per_token = []
    # The matrix products take a whole chunk of n tokens at once, the softmax a few rows of the chunk. With
    # one size of 256 rows for both, a CPU would need 45 % more time.
    for h, teacher_h, grad_h, chunk_weights, chunk_ids in split_together(
            chunk, student_hidden, teacher_hidden, grad_hidden, weights, ids):
        raw, teacher_raw = student_buffer[:len(h)], teacher_buffer[:len(h)]  # [n, V]
        float32_product(h, student_head.T, raw)
        float32_product(teacher_h, teacher_head.T, teacher_raw)
        for block in split_together(rows, raw, teacher_raw, chunk_weights, chunk_ids):
            per_token.append(divergence_in_place(*block, kind, scale, softcap))
        grad_raw = raw  # this is what the buffer holds now
        float32_product(grad_raw, student_head, grad_h)  # into this chunk's rows of grad_hidden
        float32_product(grad_raw.T, h, grad_head, add=True)
    return grad_hidden, grad_head, torch.cat(per_token, dim=1)

class WithGradients(torch.autograd.Function):
    """Sums the terms of the loss. Its backward pass returns gradients that have been computed already."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, terms, grad_hidden, grad_head):
        ctx.gradients = grad_hidden, grad_head
        return terms.sum()

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # scaled in place to save a second [V, d]; backward can therefore run only once
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None

def distill_loss(student_hidden, student_head, teacher_hidden, teacher_head, weights, divergence="reverse_kl",
                 chunk=256, tokens=None, scale=1.0, softcap=None):
    """sum_n weights[n] D(student_n, teacher_n), exact over the vocabulary, without logits [N, V] in memory.
    student_hidden [N, d] and student_head [V, d] get gradients; teacher_hidden [N, d'] and teacher_head [V,
    d'] do not. weights [N] are float32, tokens [N] the sampled ids; for scale and softcap see finish_logits.
    Each of the `chunk` tokens takes 8 V bytes (two float32 rows), on a GPU 10 V (the gradient in bfloat16).
    Returns the loss (a float32 scalar) and, without gradient, a dict: kl (the divergence), student_entropy
    and teacher_entropy (means over N, nats/token) and, given tokens, logprob [N] = log p(token)."""
    ids = torch.zeros(len(weights), dtype=torch.long, device=weights.device) if tokens is None else tokens
    grad_hidden, grad_head, per_token = chunked_divergence(
        student_hidden, student_head, teacher_hidden, teacher_head, weights, ids, divergence, chunk, scale,
        softcap)
    # The logits are freed by now; the gradients in the model's dtype take their place in memory. per_token[4]
    # are the weights, as a fork may have changed them, per_token[0] the divergences.
    loss = WithGradients.apply(student_hidden, student_head, per_token[4] * per_token[0],
                               grad_hidden.to(student_hidden.dtype), grad_head.to(student_head.dtype))
    stats = dict(zip(("kl", "student_entropy", "teacher_entropy"), per_token[:3].mean(-1)))
    return loss, stats if tokens is None else stats | dict(logprob=per_token[3])

# --------------------------------------------------------------------------------------- STUDENT AND TEACHER
# One sharded module serves both: thetabar is a second set of shards, copied into the first for one pass.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of activations, thetabar, the engine

@dataclass
class Base:
    """The model that a run starts from. open_base (section FAMILIES) opens and checks it."""
    name: str  # hub id or folder
    folder: Path  # where its files are; for a hub id, a folder of the hub's cache, named after the commit
    files: dict  # {name: content} of the files besides the weights, as they were at the start
    config: object
    tokenizer: object
    empty: nn.Module | None = None  # the language model, without content until load_model fills it
    loaded: nn.Module | None = None  # the whole model with its weights, on rank 0 until load_model

    @cached_property
    def weight_files(self):
        """The paths of the files that from_pretrained would load. They are downloaded if necessary: all ranks
        ask at once, and a lock in the hub's cache lets one of them download while the others wait."""
        with evaluator.blaming(f"--model {self.name}: expected weights, found"):
            return [Path(path) for path in find_weights(
                self.name, variant=None, gguf_file=None, use_safetensors=None, user_agent=None,
                is_remote_code=False, download_kwargs=dict(revision=self.folder.name))[0]]

class SelfDistillation(nn.Module):
    """A causal LM whose forward returns hidden states or, given the teacher's, the loss. FSDP2 gathers the
    head's whole weight when forward is called and frees it at the end, so the loss is computed in between."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.logit_options = logit_scale_and_softcap(lm.config)
        self.eval()  # no dropout, whatever the config says: the engine has none
        # transformers recomputes a layer (gradient checkpointing) only if its own flag `training` is set. The
        # modules inside stay in eval mode. A later call of train() or eval() on the model would undo this.
        for layer in lm.get_decoder().layers:
            layer.training = True

    def forward(self, inputs, response_positions, *loss_inputs, **loss_options):
        """Takes inputs [b, T] and response positions [N] as right_pad returns them; padding is at the end,
        where no token sees it. Returns hidden states [N, d] or, given (teacher_hidden, teacher_head, weights)
        as loss_inputs, what distill_loss returns."""
        hidden = self.lm.get_decoder()(inputs, use_cache=False).last_hidden_state  # [b, T, d]
        hidden = hidden.flatten(0, 1)[response_positions]  # [N, d]
        if not loss_inputs:
            return hidden
        head = self.lm.get_output_embeddings().weight
        return distill_loss(hidden, head, *loss_inputs, **self.logit_options, **loss_options)

def read_weights(base):
    """The whole model in float32, checked. Rank 0 calls this before the engine starts."""
    auto = AutoModelForCausalLM if base.config.model_type in CAUSAL_LMS else AutoModelForMultimodalLM
    with evaluator.blaming(f"--model {base.name}: expected the weights of its config.json, found"):
        lm, info = auto.from_pretrained(base.name, revision=base.folder.name,  # a hub id's commit
                                        dtype=torch.float32, output_loading_info=True,
                                        attn_implementation=base.empty.config._attn_implementation)
        check_weights(base, lm, sorted(info["missing_keys"]))
    return lm

def load_model(base, device, cfg):
    """The model, sharded, with the base's weights. Rank 0 broadcasts these and then frees its copy."""
    lm = base.empty
    source = base.loaded or lm  # on ranks > 0 only the names in it matter: rank 0 broadcasts all values
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    # `source` may be multimodal and have its decoder under another name than its text model `lm`. So each
    # weight of the decoder gets the name that it has in `lm`.
    weights = {f"{lm.base_model_prefix}.{name}": w for name, w in source.get_decoder().state_dict().items()}
    weights["lm_head.weight"] = source.get_output_embeddings().weight
    model = shard(SelfDistillation(lm), device, cfg.replicas).to_empty(device=device)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(lm, weights, options=options)
    # RoPE's buffers are in no state dict. Rank 0 copies its values; the broadcast brings them to the others.
    for buffer, original in zip(lm.get_decoder().buffers(), source.get_decoder().buffers()):
        buffer.copy_(original)
        dist.broadcast(buffer, src=0)
    base.loaded = None
    return model

def shard(model, device, replicas):
    """FSDP2: each decoder layer, the embedding and the last norm form one group of weights each. The head is
    in the group of `model` itself, and so is a tied embedding, the same tensor. A group is gathered for its
    forward, again for its backward if that needs it, and freed after each. With 8 ranks and replicas = 2
    (HSDP), ranks 0 to 3 share one copy of the model, ranks 4 to 7 another."""
    shape = replicas, dist.get_world_size() // replicas
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if replicas > 1 else mesh["shard"]
    # Casting the inputs of forward would round the tokens' weights in the loss to bfloat16.
    policy = MixedPrecisionPolicy(param_dtype=DTYPE, reduce_dtype=torch.float32, cast_forward_inputs=False)
    decoder, head = model.lm.get_decoder(), model.lm.get_output_embeddings().weight
    others = [module for module in decoder.children()  # last norm, embedding unless tied, RoPE (no weights)
              if not isinstance(module, nn.ModuleList) and all(p is not head for p in module.parameters())]
    # Backward needs neither the embedding, whose gradient does not depend on it, nor the head, whose gradient
    # was computed in forward. A group with no other weights is not gathered again.
    not_needed_in_backward = {model.lm.get_input_embeddings().weight, head}
    for module in [*decoder.layers, *others, model]:
        # Earlier rounds made DTensors of the weights further inside, of which each rank stores a shard and
        # full_tensor() gathers the whole. Those that are still plain tensors form this round's group.
        group = {p for p in module.parameters() if not isinstance(p, DTensor)}
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_unshard_in_backward(bool(group - not_needed_in_backward))
    return model

def checkpoint_weights(lm, dtype, both_names=False):
    """Yields (name, gathered tensor) as in the files of a model, one layer at a time; all ranks have to run
    through it. Experts, which transformers fuses, are split again. A tied weight comes once or, with
    both_names, under each name."""
    def layer_of(item):  # ("model.layers.7.mlp.up_proj.weight", w) -> "model.layers.7."; others: the name
        return re.sub(r"(\.\d+\.).*", r"\1", item[0])
    tied = lm.all_tied_weights_keys  # {name: the name of the weight that it shares}
    for _, layer in itertools.groupby(lm.state_dict(keep_vars=True).items(), layer_of):
        weights = {name: p.detach().to(dtype) for name, p in layer if name not in tied}
        gathered = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
        for name, w in revert_weight_conversion(lm, gathered).items():
            yield name, w
            # once more under the name of each weight that is tied to this one
            yield from [(other, w) for other, source in tied.items() if both_names and source == name]

def snapshot(model, dtype=None):  # a copy of theta's shards by name, in DTYPE unless told otherwise
    return {name: p.detach().to(dtype or DTYPE, copy=True) for name, p in model.lm.named_parameters()}

@torch.no_grad()
def copy_into(model, weights):  # overwrites the shards' values; new tensors would be unknown to FSDP
    for name, p in model.lm.named_parameters():
        p.copy_(weights[name])

def refresh(model, thetabar, step, cfg):  # thetabar <- theta after every M steps
    due = cfg.refresh_every and step % cfg.refresh_every == 0
    return snapshot(model) if due else thetabar

# -------------------------------------------------------------------------------------------------- ROLLOUTS
class Problem(NamedTuple):
    text: str  # or messages
    answer: str | None
    student: list  # the token ids of the student's prompt
    teacher: list  # and of the teacher's

def batch_at(n, step, batch_size, seed):
    """The indices of the problems of a step, here counted from 0: consecutive slices of an endless row of
    permutations of range(n), one for each epoch. It is a pure function, so a resumed run needs no sampler
    state. With n=3 and batch_size=2, step 1 has the last problem of one epoch and the first of the next."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // n for position in positions}
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(n), n) for epoch in epochs}
    return [orders[position // n][position % n] for position in positions]

@dataclass
class Rollout:
    index: int  # of the problem
    ids: list  # y as sampled: with EOS unless it was truncated, and never decoded and tokenised again
    logprobs: list  # log-probability of each of these tokens in the engine
    finished: bool  # False: truncated at max_response_tokens
    correct: bool | None = None  # None where no answer is known

class RolloutEngine:
    """vLLM in this rank's process. `vllm_tp` consecutive ranks form one engine: they split its weights and
    sample a share of the batch together. With load_format "dummy" (training), `sync` brings the weights, and
    on a GPU the engine sleeps while the trainer works. With "auto" (eval.py) it reads the base's own."""

    def __init__(self, base, cfg, load_format="dummy"):
        evaluator.say(f"starting vLLM with {base.name}, which may take some minutes ...")
        cuda = torch.cuda.is_available()
        self.tp = cfg.vllm_tp
        self.sleeps = cuda and load_format == "dummy"
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        if not cuda:  # a cache of 1 GiB, and no compiler, for which the first request would wait
            defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        os.environ.update(defaults | os.environ)  # what the user has set wins
        from vllm import LLM
        from vllm.model_executor.models.transformers import base as vllm_wrapper
        # For a family that vLLM has no class for, it wraps the class of transformers and decorates that class
        # in place for torch.compile. The trainer builds its model from the same class, and would fail.
        vllm_wrapper.Base._decorate_for_torch_compile = lambda self: None
        length = cfg.max_prompt_tokens + cfg.max_response_tokens
        self.llm = LLM(str(base.folder), distributed_executor_backend="external_launcher", seed=cfg.seed,
                       tensor_parallel_size=cfg.vllm_tp, gpu_memory_utilization=cfg.vllm_memory,
                       max_model_len=length, max_num_seqs=256, max_num_batched_tokens=max(8192, length),
                       # Chunked prefill draws from a seeded request's generator and then rewinds it, which
                       # a CPU's cannot. So it is off there, and prefix caching, which may need it, too.
                       enable_chunked_prefill=cuda, enable_prefix_caching=None if cuda else False,
                       load_format=load_format, enable_sleep_mode=self.sleeps, enforce_eager=not cuda,
                       disable_log_stats=True, use_tqdm_on_load=False, dtype=engine_dtype(base.config),
                       hf_overrides=partial(engine_config, text_only=load_format == "dummy"))
        # At exit vLLM would destroy all process groups, the trainer's too, and after a failure of one rank
        # NCCL would wait there for the others. So its finalizer is taken out: run_and_exit ends the process.
        self.llm.llm_engine.engine_core._finalizer.detach()
        dist.barrier()
        # All ranks have opened the shared memory of engines on CPUs; its name would block the next start.
        for shared in Path("/dev/shm").glob("-*cpushm*"):
            shared.unlink(missing_ok=True)
        self.sleep()

    def sync(self, model):
        """Copies theta, layer by layer, into the engine's own tensors, so that its CUDA graphs stay valid. If
        the engine's model has a module lm_head, the head is sent under that name too, even a tied one."""
        def module_names(engine_model):  # also of a tied head, whose module is the embedding's
            return [name for name, _ in engine_model.named_modules(remove_duplicate=False)]
        both_names = any(name.endswith("lm_head") for name in self.llm.apply_model(module_names)[0])
        weights = checkpoint_weights(model.lm, self.llm.llm_engine.model_config.dtype, both_names)
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # its keys and values are those of the old weights

    def sleep(self):
        if self.sleeps:
            self.llm.sleep(level=2)  # level 2 frees the weights too: `sync` brings new ones

    def share(self, items):
        """This engine's slice of the items, which is the same on all its tensor-parallel ranks."""
        number, engines = dist.get_rank() // self.tp, dist.get_world_size() // self.tp
        return items[number * len(items) // engines:(number + 1) * len(items) // engines]

    def gather(self, mine):
        """The inverse of `share`: from the engines' slices, all items in their order, on every rank."""
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
        return sum(shares[::self.tp], [])  # one slice from each engine, concatenated

    def generate(self, prompts, seeds, **sampling):
        """One sample for each list of prompt ids, as `sampled` returns it. Each has its own seed, so that it
        does not depend on the rank that makes it. logprobs=0: that of the sampled token only."""
        from vllm import SamplingParams
        params = [SamplingParams(**sampling, seed=seed, detokenize=False, logprobs=0) for seed in seeds]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [sampled(output.outputs[0]) for output in outputs]

def sampled(completion):
    """From vLLM's completion: token ids, their log-probabilities before temperature, whether it finished."""
    logprobs = [by_id[token].logprob for token, by_id in zip(completion.token_ids, completion.logprobs)]
    return list(completion.token_ids), logprobs, completion.finish_reason == "stop"

def sample_rollouts(engine, problems, indices, step, tokenizer, cfg):
    """A graded rollout for each problem of `indices`, on every rank. The engines share the sampling."""
    # A seed depends on the run's seed, the step, the problem, and how often the batch had this problem before
    # (a batch larger than the data repeats problems), but not on the rank.
    seeds = [int(hash_of((cfg.seed, step, i, indices[:k].count(i)))[:8], 16) for k, i in enumerate(indices)]
    mine = engine.share(indices)
    samples = engine.generate([problems[i].student for i in mine], engine.share(seeds),
                              max_tokens=cfg.max_response_tokens, temperature=cfg.temperature)
    rollouts = [Rollout(i, *sample) for i, sample in zip(mine, samples)]
    evaluator.grade_rollouts(rollouts, problems, tokenizer)
    return engine.gather(rollouts)

def keep_rollouts(rollouts, cfg):
    """The rollouts to train on: by default all of them, truncated and wrong ones too."""
    return [r for r in rollouts if cfg.keep == "all" or r.correct]

# --------------------------------------------------------------------------------------------- TRAINING STEP
class MicroBatch(NamedTuple):
    student: tuple  # inputs [b, T] and response positions [N] of student prompt + response
    teacher: tuple  # inputs [b, T'] and response positions [N] of teacher prompt + the same response
    tokens: torch.Tensor  # [N] the responses, concatenated
    weights: torch.Tensor  # [N] of the tokens in the loss
    logprobs: torch.Tensor  # [N] the tokens' log-probabilities in the engine
    real: bool  # False where a rank without a sequence of its own only takes part in the collectives

def token_weights(rollouts):  # 1 / (B |y|) of each token; B counts the rollouts kept, over all ranks
    return [[1 / (len(rollouts) * len(r.ids))] * len(r.ids) for r in rollouts]

def plan_micro_batches(lengths, budget, rank, world):
    """The indices of `lengths` that `rank` computes, one list for each micro-batch. The sequences are dealt
    in rounds, the longest first, one to each rank, so that all ranks have equally many micro-batches. Padded
    to its longest sequence, a micro-batch has at most `budget` tokens, unless it is a single longer sequence.
    On rank 0, which has the longest of each round, at most a twentieth of `budget` is padding. Lengths [9, 3,
    9, 8, 8, 3] and world 2 make the rounds of indices [0, 2], [3, 4], [1, 5]. With budget 20 the first two
    share a micro-batch, and rank 0 gets [[0, 3], [1]]."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    rounds = [order[k:k + world] for k in range(0, len(order), world)]  # in each, a rank gets one sequence

    def fit(some_rounds):  # into one micro-batch
        widths = [lengths[one_round[0]] for one_round in some_rounds]  # rank 0's, the longest of their rounds
        padded = widths[0] * len(widths)
        return padded <= budget and padded - sum(widths) <= budget / 20

    plan = []  # lists of rounds; each list becomes one micro-batch on every rank
    for one_round in rounds:
        if plan and fit([*plan[-1], one_round]):
            plan[-1].append(one_round)
        else:
            plan.append([one_round])
    return [[one_round[rank] for one_round in batch if rank < len(one_round)] for batch in plan]

def right_pad(prompts, responses, device):
    """From lists of ids, inputs [b, T] and response positions [N]: the positions in the flattened inputs
    whose logits predict the response tokens. Prompt [5, 6, 7] and response [8, 9] give the input 5 6 7 8,
    where positions 2 and 3 predict 8 and 9."""
    sequences = [prompt + response[:-1] for prompt, response in zip(prompts, responses)]
    inputs = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    response_positions = [row * inputs.shape[1] + torch.arange(len(prompt) - 1, len(ids))
                          for row, (prompt, ids) in enumerate(zip(prompts, sequences))]
    return inputs.to(device), torch.cat(response_positions).to(device)

def make_micro_batches(rollouts, problems, device, cfg):
    """This rank's MicroBatches. All ranks have equally many, as each has to join FSDP's collectives: a rank
    without a sequence for one of them computes the shortest rollout, with weight 0."""
    weights = token_weights(rollouts)
    shortest = min(rollouts, key=lambda r: len(r.ids))
    lengths = [max(len(problems[r.index].student), len(problems[r.index].teacher)) + len(r.ids)
               for r in rollouts]
    batches = []
    for picks in plan_micro_batches(lengths, cfg.micro_batch_tokens, dist.get_rank(), dist.get_world_size()):
        mine = [rollouts[i] for i in picks] or [shortest]
        w = [weights[i] for i in picks] or [[0.0] * len(shortest.ids)]
        responses = [r.ids for r in mine]
        batches.append(MicroBatch(  # sum(lists, []) concatenates lists
            student=right_pad([problems[r.index].student for r in mine], responses, device),
            teacher=right_pad([problems[r.index].teacher for r in mine], responses, device),
            tokens=torch.tensor(sum(responses, []), device=device),
            weights=torch.tensor(sum(w, []), device=device),
            logprobs=torch.tensor(sum([r.logprobs for r in mine], []), device=device), real=bool(picks)))
    return batches

def teacher_pass(model, thetabar, batches):
    """The teacher's last hidden states [N, d] of every micro-batch, and its head [V, d]. Logits in float32
    would take 74 times as much memory for Qwen3-8B. Afterwards theta is back, bit for bit."""
    theta = snapshot(model, torch.float32)
    copy_into(model, thetabar)
    with torch.no_grad():
        hidden = [model(*batch.teacher) for batch in batches]
    head = model.lm.get_output_embeddings().weight.detach().to(DTYPE, copy=True)  # still thetabar's
    copy_into(model, theta)
    return hidden, head.full_tensor()  # gathered by hand, as this is outside of forward

# The trainer-engine mismatch, in nats: engine and trainer are two implementations of one model, and differ in
# the log-probabilities of the sampled tokens, on average by 1e-2 in bfloat16 and by 3e-7 in float32. Of an
# engine whose weights were old, 0.2 were reported. Above MAX_GAP the run ends. Metric: logprob_gap.
MAX_GAP = {torch.bfloat16: 0.1, torch.float32: 1e-3}

def student_pass(model, batches, hidden, head, cfg):
    """Forward and backward of all micro-batches. Returns the loss and means over all tokens. Raises
    RuntimeError if the trainer-engine mismatch is larger than MAX_GAP."""
    sums = torch.zeros(5, device=head.device)  # loss, both entropies, trainer-engine mismatch, tokens
    gap_max = torch.zeros((), device=head.device)
    for batch, teacher_hidden in zip(batches, hidden):
        model.set_requires_all_reduce(batch is batches[-1])  # saves traffic: replicas average only at the end
        loss, stats = model(*batch.student, teacher_hidden, head, batch.weights, divergence=cfg.divergence,
                            chunk=cfg.loss_chunk, tokens=batch.tokens)
        (loss * dist.get_world_size()).backward()  # FSDP averages the ranks' gradients; we need their sum
        if batch.real:
            n = len(batch.tokens)
            gap = (stats["logprob"] - batch.logprobs).abs()
            sums += torch.stack([loss.detach(), n * stats["student_entropy"], n * stats["teacher_entropy"],
                                 gap.sum(), gap.new_tensor(n)])
            gap_max = gap_max.maximum(gap.max())
    dist.all_reduce(sums)
    dist.all_reduce(gap_max, op=dist.ReduceOp.MAX)
    sums[1:4] /= sums[4].clamp(min=1)
    metrics = dict(zip(("loss", "student_entropy", "teacher_entropy", "logprob_gap"), sums.tolist()))
    gap, limit = metrics["logprob_gap"], MAX_GAP[engine_dtype(model.lm.config)]
    # A NaN gap is not <= limit either. If the loss is not finite, `update` will skip the step instead.
    if math.isfinite(metrics["loss"]) and not gap <= limit:
        raise RuntimeError(f"engine and trainer differ by {gap:.4f} nats/token, expected at most {limit}. No "
                           "update was made. See README, Families; checkpoint_weights; vLLM's version")
    return metrics | dict(logprob_gap_max=gap_max.item())

def update(model, optimizer, cfg):
    """Updates this rank's shards. Skipped if the whole gradient's norm, which is returned, is not finite."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf).full_tensor().item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm

def train_step(model, thetabar, optimizer, rollouts, problems, device, cfg):  # one update -> its metrics
    batches = make_micro_batches(rollouts, problems, device, cfg)
    hidden, head = teacher_pass(model, thetabar, batches)
    metrics = student_pass(model, batches, hidden, head, cfg)
    return metrics | dict(grad_norm=update(model, optimizer, cfg))

# ------------------------------------------------------------------------------------------------------ MAIN
def main():
    device = start_processes()
    cfg = parse_settings()
    base, problems, out = prepare(cfg)
    engine = RolloutEngine(base, cfg)  # before the model: vLLM measures how much of the GPU's memory is free
    model = load_model(base, device, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    thetabar = snapshot(model)
    done = load_newest(out, model, optimizer, thetabar, cfg) if cfg.resume else 0  # steps done earlier
    trim_logs(out, done)
    skipped = idle = 0  # how many steps in a row had a gradient that was not finite, or no rollout to learn
    for step in range(done + 1, cfg.steps + 1):
        start = time.perf_counter()
        metrics = dict(step=step, lr=optimizer.param_groups[0]["lr"],
                       teacher_age=(step - 1) % cfg.refresh_every if cfg.refresh_every else step - 1)
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
            export(model, base, out / f"model-{step}")
    export(model, base, out / "model")
    evaluator.say(f"done: {out}/model is that of step {max(done, cfg.steps)}")

# ------------------------------------------------------------------------------------------------ CHECKPOINT
# checkpoint-K/ holds theta, Adam's state and thetabar in shards, which any number of ranks can load. While a
# file or folder is being written, it is called UNFINISHED. A run replaces only what it wrote itself.
UNFINISHED = "unfinished"

def training_state(model, optimizer, thetabar):
    adam = dcp_state.get_optimizer_state_dict(model, optimizer)
    return {"theta": dict(model.lm.named_parameters()), "thetabar": thetabar, "optimizer": adam}

def save_checkpoint(out, step, model, optimizer, thetabar):
    if not optimizer.state:  # no update was made yet: Adam has nothing to save
        return
    try:
        dcp.save(training_state(model, optimizer, thetabar), checkpoint_id=out / UNFINISHED)
    except dcp.CheckpointException as error:  # whose message does not mention a full disk
        if shutil.disk_usage(out).free < 2**20:
            raise OSError(f"{out}: no space left on the device") from error
        raise
    if dist.get_rank() == 0:
        (out / UNFINISHED).rename(out / f"checkpoint-{step}")
        for _, old in checkpoints(out)[2:]:
            shutil.rmtree(old, ignore_errors=True)
            if old.exists():
                evaluator.say(f"{old} is no longer needed, but could not be removed")
    dist.barrier()

def checkpoints(out):  # [(step, folder)] of the finished ones, newest first
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(((int(path.name[11:]), path) for path in found), reverse=True)

def load_newest(out, model, optimizer, thetabar, cfg):
    """Loads theta, Adam's state and thetabar in place from the newest checkpoint that is whole. Returns the
    number of steps done. Damaged newer ones are renamed, and so neither counted nor deleted by saves."""
    damaged = []
    for step, path in evaluator.from_rank_0(checkpoints, out):  # another node may still see an older list
        state = training_state(model, optimizer, thetabar)
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.CheckpointException as error:  # all ranks raise it
            evaluator.say(f"skipping {path}, which is not whole: {damage_or_raise(path, error)}")
            damaged.append(path)
            continue
        dcp_state.set_optimizer_state_dict(model, optimizer, state["optimizer"])
        optimizer.param_groups[0].update(lr=cfg.lr, weight_decay=cfg.weight_decay)  # not the checkpoint's
        for newer in damaged:
            evaluator.from_rank_0(newer.rename, out / f"damaged-{newer.name}-{time.time():.0f}")
        evaluator.say(f"--resume: {step} steps are done")
        return step
    evaluator.check(not damaged, f"--resume: no checkpoint in {out} is whole; use another --out to restart")
    return 0

# What torch says of a file that is truncated, overwritten or missing (errno 2). Anything else, and a text
# that names another errno, may be a passing fault of the file system: the run ends, nothing is renamed.
DAMAGE = re.compile(r"EOFError|UnpicklingError|PytorchStreamReader|metadata is None|\[Errno 2\]")

def damage_or_raise(path, error):
    """Why a checkpoint is not whole. RuntimeError: it may be whole, but could not be loaded."""
    for cause, _ in error.failures.values():
        text = f"{type(cause).__name__}: {str(cause).strip():.300}"
        if not DAMAGE.search(text) or re.search(r"\[Errno (?!2\])", text):
            raise RuntimeError(f"--resume: {path} may be whole, but could not be loaded: {text}. Nothing was "
                               "changed; repeat the command when this is mended") from error
    return text

def trim_logs(out, step):  # drops later steps, which are done again, and a line that a kill left unfinished
    for log in (out / "metrics.jsonl", out / "samples.jsonl"):
        if dist.get_rank() == 0 and log.exists():
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            replace_file(log, "".join(line for line in lines if json.loads(line)["step"] <= step))

def remove_unfinished(out):  # folders that a killed run left; files of this name are overwritten
    for path in out.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)

def replace_file(path, text):  # a kill never leaves half a file: the text is written beside it, then renamed
    path.with_name(UNFINISHED).write_text(text)
    path.with_name(UNFINISHED).replace(path)

def export(model, base, target):
    """Writes the folder `target`: theta in bfloat16, gathered in rank 0's memory, and the base's other files
    as they were at the start of the run."""
    gathered = checkpoint_weights(model.lm, torch.bfloat16)  # a generator that all ranks have to exhaust
    weights = {name: w.to("cpu", copy=True) for name, w in gathered if dist.get_rank() == 0}
    if dist.get_rank() == 0:
        folder = target.with_name(UNFINISHED)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in base.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        replace_file(folder / "config.json", json.dumps(exported_config(base), indent=2))
        save_torch_state_dict(weights, folder)
        for path in folder.glob("*.safetensors"):  # these are created so that only their owner can read them
            path.chmod((folder / "config.json").stat().st_mode)
        if target.exists():  # of an earlier run: renamed, since a kill must not leave it half removed
            target.rename(target.with_name(f"{UNFINISHED}-{target.name}"))
        folder.rename(target)
        remove_unfinished(target.parent)
    dist.barrier()

def exported_config(base):
    """The base's config.json for weights in bfloat16; of a multimodal model, the part of its text model."""
    config, text = json.loads(base.files["config.json"]), base.empty.config
    if "text_config" in config:
        names = "model_type", "architectures", "tie_word_embeddings", "eos_token_id", "pad_token_id"
        config = config["text_config"] | {name: getattr(text, name) for name in names}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # transformers 4 looks for it beside rope_parameters
        config["rope_theta"] = rope["rope_theta"]
    return config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}

# -------------------------------------------------------------------------------------------------- FAMILIES
# All differences between families of models, and which models cannot be trained. FILES are the files besides
# the weights that decide a model's output, as patterns that the hub understands too.
FILES = ("*config.json", "*token*.json", "*.jinja", "*/*.jinja", "chat_template.json", "vocab.*",
         "merges.txt", "tekken.json", "*.model", "*.tiktoken", "modules.json")

def open_base(name, to_train):
    """The Base without its weights. Raises ValueError if it is no chat model or cannot be trained rightly."""
    with evaluator.blaming(f"--model {name}: expected a folder with a chat model or its hub id, found"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # the default would ask
        text = config.get_text_config()
        folder = Path(cached_file(name, "config.json")).parent
        if not Path(name).is_dir():
            snapshot_download(name, revision=folder.name, allow_patterns=FILES)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        evaluator.check(tokenizer.chat_template, "no chat template; save a tokenizer with one there")
        evaluator.check(abs(text.pad_token_id or 0) < text.vocab_size, "a pad_token_id of no token")
    files = {str(path.relative_to(folder)): path.read_bytes()
             for pattern in FILES for path in folder.glob(pattern)}
    base = Base(name, folder, files, config, tokenizer)
    if to_train:
        with evaluator.blaming(f"--model {name}: expected a trainable causal language model, found"):
            kind = (config.architectures or ["?"])[0]
            known = kind.endswith(("ForCausalLM", "ForConditionalGeneration"))
            evaluator.check(known and text.model_type in CAUSAL_LMS and not config.is_encoder_decoder,
                            f"{kind} of type {text.model_type}")
            evaluator.check("modules.json" not in files, "an embedding model")
            quantised = [c for c in (config, text) if getattr(c, "quantization_config", None)]
            evaluator.check(not quantised, "quantised weights")
            with torch.device("meta"):
                base.empty = AutoModelForCausalLM.from_config(text_config(config), dtype=torch.float32)
            SelfDistillation(base.empty)  # fails if the decoder has no .layers
    return base

def model_hash(base):
    """A hash of all that determines the model's output, on every rank. A copy elsewhere has the same hash."""
    paths = base.weight_files

    def hash_weights():
        return sorted(map(file_hash, paths))
    return hash_of([sorted(base.files.items()), evaluator.from_rank_0(hash_weights)])

def file_hash(path):
    with evaluator.blaming(f"{path}: expected weights, found a pointer or half a file"):
        if path.suffix == ".safetensors":  # raises if damaged; transformers checks a .bin itself
            safetensors.safe_open(path, "pt")
        # In the hub's cache, the name of the file is already its sha256.
        if re.fullmatch(".*/blobs/[0-9a-f]{64}", str(path.resolve())):
            return path.resolve().name
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

def check_ids(base, prompts):
    rows = base.config.get_text_config().vocab_size
    largest = max(map(max, prompts), default=0)
    evaluator.check(largest < rows, f"--model {base.name}: the embedding has no row for token id {largest}")

def text_config(config):
    """The config of the text model: of a multimodal model, only that is trained, run and exported."""
    text = config.get_text_config()
    if text is not config:
        text.architectures = [CAUSAL_LMS[text.model_type]]
    if getattr(text, "attn_logit_softcapping", None):
        text._attn_implementation = "eager"  # sdpa would leave this softcap out, without a warning
    return text

def engine_config(config, text_only):
    """Changes the config that vLLM has loaded, so that it computes what the trainer does."""
    config = text_config(config) if text_only else config
    text = config.get_text_config()
    text.head_dtype = config.head_dtype = "float32"
    if text.model_type.startswith("cohere2"):
        text.sliding_window -= 1  # vLLM adds one to it, transformers does not
    rope = getattr(text, "rope_parameters", None) or {}
    if "llama_4_scaling_beta" in rope:  # of Ministral 3's queries; vLLM has another name for it
        text.llama_4_scaling = rope | dict(beta=rope["llama_4_scaling_beta"])
    return config

def engine_dtype(config):  # vLLM's kernels for gated delta-nets exist in bfloat16 only
    delta_net = hasattr(config.get_text_config(), "linear_key_head_dim")
    return torch.bfloat16 if delta_net else DTYPE

def logit_scale_and_softcap(config):  # for finish_logits; check_weights notices if a family needs more
    text = config.get_text_config()
    multipliers = [getattr(text, name, None) or 1 for name in ("logit_scale", "lm_head_multiplier")]
    return dict(scale=math.prod(multipliers) / (getattr(text, "logits_scaling", None) or 1),
                softcap=getattr(text, "final_logit_softcapping", None))

@torch.no_grad()
def check_weights(base, lm, missing):
    """Checks that the weights are whole, and that the loss computes the logits of this model. The model's own
    forward gets eight tokens, ours the same eight and four more. If the log-probabilities of the likeliest
    next tokens differ, the logits depend on more than logit_scale_and_softcap knows, or on later tokens."""
    ids, positions = torch.arange(12)[None], torch.arange(8)
    own, likeliest = lm.eval()(ids[:, :8], use_cache=False).logits[0].log_softmax(-1).max(-1)
    ours, head = SelfDistillation(lm), lm.get_output_embeddings().weight
    hidden = ours(ids, positions)  # also in place of the teacher's, as only the student's logprob is used
    _, stats = ours(ids, positions, hidden, head, torch.ones(8), tokens=likeliest)
    error = (stats["logprob"] - own).abs().max().item()
    # transformers unties weights that the config ties, if the files have two different tensors
    as_configured = bool(lm.all_tied_weights_keys) == bool(base.empty.all_tied_weights_keys)
    evaluator.check(not missing, f"none of {missing[:3]}")
    evaluator.check(as_configured, "two tensors for embedding and head; set tie_word_embeddings to false")
    finite = all(w.isfinite().all() for w in lm.state_dict().values())
    evaluator.check(finite, "NaN or infinity; take another copy")
    evaluator.check(error <= 1e-3, f"log-probabilities that are {error:.1g} nats from those that the loss "
                    "computes: this family needs more than logit_scale_and_softcap, or tokens see later ones")

# ---------------------------------------------------------------------------------------------------- CHECKS
# Mistakes in the input are reported before the engine starts: what was expected, what was found, what to do.
def hash_of(value):  # 16 hexadecimal digits of the sha256 of its repr
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

def read_instruction(name):
    """The text of c. `name` is a key of INSTRUCTIONS in upper or lower case, @FILE, or the text itself."""
    text = INSTRUCTIONS.get(name.replace(" ", "").lower(), name).strip()
    if name.startswith("@"):
        with evaluator.blaming(f"--instruction {name}, expected a text file in the encoding UTF-8"):
            text = Path(name[1:]).expanduser().read_text("utf-8-sig").strip()
    # A text of printable ASCII without a space is a mistyped key, which would be trained on unnoticed.
    evaluator.check(re.search("[^!-~]", text), f"--instruction {name}: expected "
                    f"{', '.join(INSTRUCTIONS)}, @FILE or a text, found {text!r}")
    return text

def make_problems(cfg, base, instruction):
    """The problems whose prompts are not too long. `read_problems` drops repeats and strips the wrapper."""
    prompt = partial(prompt_ids, base.tokenizer, thinking=cfg.thinking, wrapper=cfg.wrapper)
    problems = [Problem(p["problem"], p["answer"], prompt(p["problem"], tools=p["tools"]),
                        prompt(p["problem"], instruction, tools=p["tools"]))
                for p in evaluator.read_problems(cfg.data, *WRAPPERS[cfg.wrapper])]
    check_ids(base, [p.student + p.teacher for p in problems])
    short = [p for p in problems if max(len(p.student), len(p.teacher)) <= cfg.max_prompt_tokens]
    evaluator.say(f"{len(short)} of {len(problems)} problems have prompts of at most {cfg.max_prompt_tokens} "
                  f"tokens; {evaluator.__file__} grades the rollouts")
    evaluator.check(any(cfg.keep == "all" or p.answer for p in short), f"--data {cfg.data}: found no problem "
                    "with so short a prompt and, for --keep correct, a known answer")
    return short

# The settings that --resume lets change, with a line on the console. `model` and `data` are only names: the
# hashes of both, which `prepare` adds to the settings, must stay the same. So must all other settings.
MAY_CHANGE = ("model data out steps lr weight_decay clip save_every export_every micro_batch_tokens "
              "loss_chunk gradient_checkpointing replicas vllm_tp vllm_memory").split()
# Names in --out. A new run is refused where there are RESULTS. Any run is refused where there are RUN_FILES
# unless the folder has the mark of an earlier run, opsdc.lock.
RESULTS = r"checkpoint-\d+|model(-\d+)?"
RUN_FILES = rf"{RESULTS}|config\.json|(metrics|samples)\.jsonl|{UNFINISHED}.*|eval\.lock"

def parse_settings():
    parser = HfArgumentParser(Config, allow_abbrev=False)
    parser.error = evaluator.refuse_words  # a mistyped option gives one line, from one rank
    return Config(**vars(parser.parse_args()))

def prepare(cfg):
    """Makes all checks. Returns the base (on rank 0 with its weights), the problems and the run's folder."""
    evaluator.check_settings(vars(cfg))
    instruction, out = read_instruction(cfg.instruction), Path(cfg.out)
    base = open_base(cfg.model, to_train=True)
    context = evaluator.context_of(base)
    evaluator.check(cfg.max_prompt_tokens + cfg.max_response_tokens <= context, "--max_prompt_tokens + "
                    f"--max_response_tokens: expected at most the model's context, {context}")
    problems = evaluator.from_rank_0(make_problems, cfg, base, instruction)
    settings = asdict(cfg) | dict(instruction=instruction, template=hash_of(base.tokenizer.chat_template),
                                  model_hash=model_hash(base),
                                  problems=hash_of([(p.text, p.answer) for p in problems]))
    evaluator.claim_folder(out, "opsdc.lock", files=RUN_FILES, results="" if cfg.resume else RESULTS)
    evaluator.from_rank_0(start_run, base, out, settings)
    evaluator.say(f"the first teacher's prompt:\n{base.tokenizer.decode(problems[0].teacher)}")
    return base, problems, out

def start_run(base, out, settings):
    """On rank 0: compares the settings with those of the run to continue, and reads the weights."""
    if checkpoints(out):
        compare_settings(out / "config.json", settings)
    remove_unfinished(out)
    base.loaded = read_weights(base)
    replace_file(out / "config.json", json.dumps(settings, indent=1))
    billions = sum(p.numel() for p in base.empty.parameters()) / 1e9  # of parameters; times their bytes: GB
    exports = 1 + (settings["steps"] // settings["export_every"] if settings["export_every"] else 0)
    evaluator.say(f"each of 3 checkpoints takes {(12 + DTYPE.itemsize) * billions:.3g} GB, each of {exports} "
                  f"exports {2 * billions:.3g} GB; {shutil.disk_usage(out).free / 1e9:.3g} GB are free")
    if torch.cuda.is_available() and settings["gradient_checkpointing"]:
        evaluator.say(f"training takes about {training_bytes(base.empty, settings) / 1e9:.3g} GB of a GPU's "
                      f"{torch.cuda.mem_get_info()[1] / 1e9:.3g} GB; a sleeping engine takes 3 to 4 GB more")

def training_bytes(lm, settings):
    """About the most that training needs on a GPU, with gradient checkpointing: its shards of the weights, of
    Adam's state, thetabar and the gradients (18 bytes a parameter), the layers' inputs, and the larger of
    what the loss and the backward pass of a layer add. `python test_opsdc.py memory` counts it exactly."""
    V, d = lm.get_output_embeddings().weight.shape
    layers, T = lm.get_decoder().layers, settings["micro_batch_tokens"]
    layer = sum(p.numel() for p in layers[0].parameters())
    shards = 18 * sum(p.numel() for p in lm.parameters()) * settings["replicas"] / dist.get_world_size()
    # At the two peaks, the softmax of the loss and a layer's backward: 8 V d are both heads and a float32
    # gradient, 8 V a token are two rows of logits. The other factors are fitted to that command's counts.
    loss = 8 * V * (d + settings["loss_chunk"]) + 45 * BLOCK["cuda"] + 24 * d * T
    backward = 4 * V * d + 8 * layer + (4 * layer / d + 22 * d) * T
    return shards + 2 * d * len(layers) * T + max(loss, backward)

def compare_settings(file, settings):
    """Compares the settings with those of the run that --resume continues."""
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
    """Completes the metrics. Writes a line of metrics.jsonl, four of samples.jsonl, one on the console."""
    if dist.get_rank() != 0:
        return
    lengths = [len(r.ids) for r in rollouts]
    graded = [r.correct for r in rollouts if r.correct is not None]
    metrics |= dict(response_tokens=fmean(lengths), response_tokens_min=min(lengths),
                    response_tokens_max=max(lengths), truncated=fmean(not r.finished for r in rollouts),
                    tokens_per_second=sum(lengths) / metrics["seconds_generate"],
                    accuracy=fmean(graded) if graded else None)
    metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    samples = [dict(step=metrics["step"], problem=problems[r.index].text, response=tokenizer.decode(r.ids),
                    answer=problems[r.index].answer, correct=r.correct, finished=r.finished, ids=r.ids)
               for r in rollouts[:4]]
    for name, rows in (("samples.jsonl", samples), ("metrics.jsonl", [metrics])):
        with open(out / name, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    shown = [name for name in CONSOLE if metrics.get(name) is not None]
    evaluator.say("  ".join(f"{name} {metrics[name]:.4g}" for name in shown))

# ------------------------------------------------------------------------------------------------- PROCESSES
def start_processes():
    """Joins torchrun's process group, or makes one of a single rank. Returns this rank's device."""
    os.environ.update(dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
                           MASTER_ADDR="127.0.0.1", MASTER_PORT="0") | os.environ)
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    message = "rank {RANK} waits for the others of WORLD_SIZE={WORLD_SIZE}; to run alone, unset both"
    waiting = threading.Timer(30, print, [message.format_map(os.environ)], {"flush": True})
    waiting.start()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    waiting.cancel()
    return device

def run_and_exit(main):
    """Runs main() and ends the process. Python's own exit would wait in vLLM and NCCL for failed ranks."""
    status = 1
    try:
        main()
        status = 0
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            status = error.code or 0  # as of --help, which has printed its text
        else:
            evaluator.say_once(error)
    sys.stdout.flush()
    os._exit(status)

if __name__ == "__main__":
    if not hasattr(evaluator, "grade_rollouts"):
        sys.exit(f"error: opsdc.py needs this project's eval.py beside it, found {evaluator.__file__}")
    run_and_exit(main)
