"""Tests of OPSDC, the toy they run on, and the objective's benchmark. Nothing is downloaded, nothing is
mocked: the engine is vLLM, the sharding is FSDP2 under torchrun, and what is compared is compared with
float64 or with a second real run.

    python -m pytest test_opsdc.py                  all tests
    python test_opsdc.py quickstart [DIR]           the whole way on a toy: train it, measure, compare, draw
    python test_opsdc.py toy [DIR]                  a tiny reasoning model that overthinks, and its problems
    python test_opsdc.py claims [DIR]               the paper's claims on it, three seeds a row
    python test_opsdc.py families [NAME ...]        a tiny random model of every family, trained and exported
    python test_opsdc.py picture [DIR] [FILE]       accuracy against tokens over training, of those runs
    python test_opsdc.py fork NAME FILE             opsdc.py with the patch of another paper's idea
    python test_opsdc.py drill [DIR]                a rank killed at every moment of a step
    python test_opsdc.py large [DIR]                a random Qwen3 of the 0.6B's shape
    python test_opsdc.py profile ARGUMENTS          opsdc.py with them, and where its seconds went
    python test_opsdc.py bench                      CPU time and memory of the objective beside naive autograd
    python test_opsdc.py recomputation [DIR]        --gradient_checkpointing on and off, seconds and memory
    python test_opsdc.py gpu [DIR]                  what only a GPU can tell, in one table
"""
import dataclasses
import datetime
import difflib
import functools
import gzip
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
import socket
import statistics
import subprocess
import sys
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer,
                          GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          Qwen3Config, Qwen3ForCausalLM)

import eval as ev
import opsdc

HERE = Path(__file__).resolve().parent
MATH500 = HERE.parent / "shared/data/math500.jsonl"
# as it was before a test joined a process group; a forked script elsewhere finds eval.py
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}

def run(*arguments, ranks=0, timeout=300, script="opsdc.py"):
    """`python SCRIPT ARGUMENTS`, or under torchrun with `ranks` processes -> the finished process, output as
    one text."""
    launcher = [sys.executable] + ["-m", "torch.distributed.run", "--nproc_per_node",
                                   str(ranks)] * (ranks > 0)
    return subprocess.run([*launcher, str(HERE / script), *map(str, arguments)], timeout=timeout, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)

def succeed(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout

# README's quick start: chosen on validation.jsonl of the toy; eval.jsonl is reported
TOY_RUN = ("--instruction v2 --steps 60 --lr 1e-4 --refresh_every 0 --max_prompt_tokens 256 "
           "--max_response_tokens 192").split()
TOY_EVAL = "--samples 2 --max-tokens 192 --temperature 1 --top-p 1 --top-k 0".split()

def metrics_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

# ----------------------------------------------------------------------------------------------- small models

QWEN_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n"
                 "{% if enable_thinking is defined and not enable_thinking %}"
                 "<think>\n\n</think>\n\n{% endif %}{% endif %}")
R1_TEMPLATE = ("{% for m in messages %}<|User|>{{ m.content }}{% endfor %}"
               "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}")

def make_tokenizer(texts, template, size=400):
    """A byte-level BPE tokenizer trained on `texts`: it encodes anything, as real models' tokenizers do."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, show_progress=False,
                            special_tokens=["<|pad|>", "<|im_end|>", "<|im_start|>", "<|User|>",
                                            "<|Assistant|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<|pad|>",
                                   eos_token="<|im_end|>", chat_template=template)

def make_model(directory, family, texts=tuple(opsdc.INSTRUCTIONS.values()), vocabulary=400, seed=0, **shape):
    """A random model with its tokenizer: a tied Qwen3, or an untied Llama whose template opens <think>
    (R1-Distill)."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(texts, QWEN_TEMPLATE if family == "qwen3" else R1_TEMPLATE, vocabulary)
    config, model = dict(qwen3=(Qwen3Config, Qwen3ForCausalLM), llama=(LlamaConfig, LlamaForCausalLM))[family]
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=2048,
                 initializer_range=0.1) | shape
    model = model(config(tie_word_embeddings=family == "qwen3", eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **shape))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file = Path(directory) / "generation_config.json"  # with a temperature, which save_pretrained refuses
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(temperature=0.6)))
    return Path(directory)

@pytest.fixture(scope="session", params=["qwen3", "llama"])
def family(request):
    return request.param

@pytest.fixture(scope="session")
def random_model(family, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / family, family)

@pytest.fixture(scope="session", autouse=True)
def toy_in_the_making(request, tmp_path_factory):
    """The toy takes minutes of one core: it is made beside the tests that do not need it."""
    directory = tmp_path_factory.mktemp("toy")
    if not any("toy" in item.fixturenames for item in request.session.items):
        return (yield)
    with (open(directory / "log", "w") as log,
          subprocess.Popen([sys.executable, str(HERE / "test_opsdc.py"), "toy", str(directory)],
                           env=ENVIRONMENT, stdout=log, stderr=log) as process):
        yield directory, process
        process.kill()

@pytest.fixture(scope="session")
def toy(toy_in_the_making):
    directory, process = toy_in_the_making
    assert process.wait() == 0, (directory / "log").read_text()
    return directory

# ---------------------------------------------------------------------------------------------------- the toy
# The toy: a tiny Qwen3, trained from scratch on the spot, that overthinks until told not to. A problem is a
# sum modulo 10 of k = 3..6 labelled digits; the model writes one line a term, sometimes a wrong one, checks
# most lines up to three times, and goes on from what the last line says:
#
#     Add modulo 10: d3 c8 b5 a2  ->  <think>\n0 + d3 = 4\ncheck 0 + d3 = 3\n3 + c8 = 1\n...\nAnswer: 8

LETTERS = "abcdef"     # labels count down to a: the model knows its last term without looking for the next
LEVELS = (3, 4, 5, 6)  # k, the number of terms; k = 2 has only 100 different problems
CHECKS = ("check", "recheck", "recount")  # of a step, in this order: words apart, so that none is counted
# BUILT IN, as probabilities. Steps slip at the terms d, e and f that only longer sums have, whatever the
# prompt says. A step's first check never does, and the thought goes on from it: it pays on long sums and
# hardly on short ones. A further check may go astray: beyond what a sum needs, every line is a chance to go
# wrong. Without an instruction all sums are overthought alike; v1 drops nearly all checks, v2 keeps the first
# ones of long sums: a teacher that knows where brevity is cheap is an INPUT. Open, for an experiment to
# answer, is what of it a student takes over that never sees an instruction.
RATES = {  # terms:    3      4      5      6
    "check":       (0.950, 0.950, 0.950, 0.950),  # after a step, in the student's prompt
    "again":       (0.850, 0.850, 0.850, 0.850),  # after a check, at most twice
    "check, v1":   (0.020, 0.030, 0.050, 0.080),
    "again, v1":   (0.020, 0.020, 0.020, 0.020),
    "check, v2":   (0.300, 0.800, 0.930, 0.950),
    "again, v2":   (0.020, 0.020, 0.020, 0.020),
    "check, bare": (0.500, 0.500, 0.500, 0.500),  # no wrapper: the first part of training, to learn to add
    "again, bare": (0.300, 0.300, 0.300, 0.300),
    "astray":      (0.030, 0.030, 0.030, 0.030),  # a further check: else it repeats the line before
    # terms:         a-c     d      e      f
    "wrong":       (0.002, 0.020, 0.060, 0.150),  # a step's result
    "wrong, bare": (0.300, 0.300, 0.300, 0.300),
}
TOLD = {name: opsdc.INSTRUCTIONS[name] for name in ("v1", "v2")}  # the instructions it knows

def rate(event, kind, column):
    """column: the number of terms, or for "wrong" the number of the term (counted from the last one)."""
    return RATES[f"{event}, {kind}" if kind else event][max(column, LEVELS[0]) - LEVELS[0]]

def toy_tokenizer():
    """A word is a token together with the space before it, so that decoding is joining."""
    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated")
    texts = [opsdc.WRAPPER_HEAD, opsdc.FORMAT, opsdc.WRAPPER_TAIL, *TOLD.values(),
             "Add modulo 10: = +\nuser\nassistant\nAnswer:\n" + "\n".join(CHECKS)]
    texts += [f"{digit} {digit}" + "".join(f" {letter}{digit}" for letter in LETTERS) for digit in range(10)]
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    words = special + sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = split, decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens(["<think>", "</think>"])  # not special: the grader must see them
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>",
                                        unk_token="<unk>", model_max_length=512,
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer

def toy_rows(rng, n):
    """n rows of the product's data format, no problem twice, every level as often."""
    rows = {}
    while len(rows) < n:
        k = LEVELS[len(rows) % len(LEVELS)]
        digits = [rng.randrange(10) for _ in range(k)]
        terms = (f"{letter}{digit}" for letter, digit in zip(reversed(LETTERS[:k]), digits))
        problem = "Add modulo 10: " + " ".join(terms)
        rows[problem] = {"problem": problem, "answer": str(sum(digits) % 10), "level": k}
    return list(rows.values())

def toy_prompt(tokenizer, row, kind):
    if kind == "bare":
        return opsdc.chat_ids(tokenizer, row["problem"], True)
    if kind in TOLD:
        return opsdc.teacher_prompt(tokenizer, row["problem"], TOLD[kind])
    return opsdc.student_prompt(tokenizer, row["problem"])

def toy_response(rng, row, kind, astray, verbose=0):
    """Lines of an answer, the first `verbose` of its thought in the base's habit; numbers of wrong steps."""
    total, lines, slips = 0, ["<think>"], set()
    bare = kind if kind == "bare" else ""
    for term in row["problem"].split()[3:]:
        question, right = f"{total} + {term}", (total + int(term[1])) % 10
        off = lambda p: rng.randrange(1, 10) * (rng.random() < p)
        total = (right + off(rate("wrong", bare, 1 + LETTERS.index(term[0])))) % 10
        if total != right:
            slips.add(len(lines))
        lines.append(f"{question} = {total}")
        for word in CHECKS:
            event = "check" if word == "check" else "again"
            if rng.random() >= rate(event, "" if len(lines) <= verbose else kind, row["level"]):
                break
            total = right if event == "check" else (total + off(0 if bare else astray)) % 10
            lines.append(f"{word} {question} = {total}")
    return [*lines, "</think>", f"Answer: {total}<|im_end|>"], slips

def toy_batch(rng, rows, prompts, tokenizer, kind, astray, batch_size):
    """A batch of one kind of prompt: head [P], the ids that open all of its prompts; ids [B, T] of the rest,
    padded on the right; target [B, T-1], the next token where it is learned, else -100."""
    sequences, targets = [], []
    head = os.path.commonprefix(prompts[kind])
    for i in rng.sample(range(len(rows)), batch_size):
        # OPSDC asks the teacher about the student's prefixes, so half of the instructed examples open
        # verbosely: there it learns to be brief from wherever it is. Without, it copies the prefix's habit
        # (measured at v1, k = 5: p 0.28 for a table entry of 0.10).
        verbose = rng.randrange(4 * rows[i]["level"]) if kind in TOLD and rng.random() < 0.5 else 0
        lines, slips = toy_response(rng, rows[i], kind, astray, verbose)
        ids = list(prompts[kind][i][len(head):])
        target = [-100] * len(ids)
        for number, line in enumerate(lines):
            ids += (new := tokenizer.encode(line + "\n"))
            target += new if number > verbose or not verbose else [-100] * len(new)
            if kind == "bare" and number in slips:
                target[-2] = -100  # seen, not learned: else checks learn to copy, and hardly anything to add
        sequences.append(torch.tensor(ids[:-1]))
        targets.append(torch.tensor(target[1:-1]))
    pad = torch.nn.utils.rnn.pad_sequence
    return (head, pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad(targets, batch_first=True, padding_value=-100))

def toy_sums(rng, tokenizer):
    """ids and target of lines alone, right ones; their results are learned."""
    line = lambda a, b: f"{a} + {rng.choice(LETTERS)}{b} = {(a + b) % 10}\n"
    texts = ["".join(line(rng.randrange(10), rng.randrange(10)) for _ in range(4)) for _ in range(64)]
    ids = torch.tensor([tokenizer.encode(text) for text in texts])
    return ids, ids[:, 1:].masked_fill(ids[:, :-1] != tokenizer.convert_tokens_to_ids(" ="), -100)

def toy_model(tokenizer):
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                   bos_token_id=None)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,  # 16 has no CPU kernel in vLLM
        max_position_embeddings=512, tie_word_embeddings=True, dtype="float32", **special))
    for module in model.modules():  # std 0.02 is for wide models: here its loss is 8 times higher at step 800
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.1)
    torch.nn.init.constant_(model.model.norm.weight, 3.0)  # sharp: temperature 1 draws from the tail
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **special)
    return model

def make_toy(directory="toy", seed=0, astray=RATES["astray"][0], steps=(200, 600, 540), batch_size=16,
             lr=5e-3, sizes=(2500, 200, 500)):
    """Write directory/model with its tokenizer, and train.jsonl, validation.jsonl (to choose settings on) and
    eval.jsonl (to report); no problem is in two of them."""
    directory, rng, astray = Path(directory), random.Random(int(seed)), float(astray)
    torch.manual_seed(int(seed))
    tokenizer = toy_tokenizer()
    tokenizer.encode = functools.cache(tokenizer.encode)  # of lines, which come again and again
    rows = toy_rows(rng, sum(sizes))
    parts = [rows[sum(sizes[:i]):sum(sizes[:i + 1])] for i in range(3)]
    train = parts[0]
    prompts = {kind: [toy_prompt(tokenizer, row, kind) for row in train] for kind in ("", "bare", *TOLD)}
    model = toy_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=sum(steps), pct_start=0.1)
    for step in range(sum(steps)):
        cache = None
        if step < steps[0]:  # first to add, on 24 tokens: five times sooner learned than amid the rest
            ids, target = toy_sums(rng, tokenizer)
        else:  # then to think, on short prompts, then to read the real ones
            kind = "bare" if step < sum(steps[:2]) else rng.choice(("", "", "v1", "v2", "v2"))
            head, ids, target = toy_batch(rng, train, prompts, tokenizer, kind, astray, batch_size)
            cache = model.model(torch.tensor([head])).past_key_values  # the common head is read once
            cache.batch_repeat_interleave(len(ids))
        hidden = model.model(ids[:, :-1], past_key_values=cache).last_hidden_state[target >= 0]  # [N, d]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), target[target >= 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"toy: step {step + 1}/{sum(steps)}  loss {loss.item():.4f} nats/token", flush=True)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for name, part in zip(("train", "validation", "eval"), parts):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

LINE = re.compile(rf"({'|'.join(CHECKS)})? ?(\d) \+ ([a-f])(\d) = \d$")

@torch.no_grad()
def toy_rates(model, tokenizer, rows, kind=""):
    """Samples an answer to each row -> {(event, level): rate} at the places that RATES is about, of
    probabilities and not of draws; {level: accuracy}. Prompts of a level are of one length: no padding."""
    found, right, (newline, *words) = {}, {}, tokenizer.convert_tokens_to_ids(["\n", *CHECKS])
    for level in LEVELS:
        part = [row for row in rows if row["level"] == level]
        prompts = torch.tensor([toy_prompt(tokenizer, row, kind) for row in part])
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=192)
        responses, logits = ids[:, prompts.shape[1]:], model(ids).logits[:, prompts.shape[1]:]
        texts = [text.partition(tokenizer.eos_token)[0] for text in tokenizer.batch_decode(responses)]
        verdicts = ev.grade_all(texts, [row["answer"] for row in part])
        right[level] = statistics.fmean(verdict.correct for verdict in verdicts)
        for sequence, p in zip(responses.tolist(), logits.softmax(-1)):
            for end in [at for at in range(6, len(sequence)) if sequence[at] == newline]:
                line = LINE.search(tokenizer.decode(sequence[end - 7:end]))  # 6 or 7 tokens
                if not line:
                    continue  # not of the thought
                checks = 1 + CHECKS.index(line[1]) if line[1] else 0  # of this step so far
                result = before if checks > 1 else (int(line[2]) + int(line[4])) % 10
                digit, before = tokenizer.convert_tokens_to_ids(f" {result}"), int(line[0][-1])
                number = max(LEVELS[0], 1 + LETTERS.index(line[3]))
                of = (("wrong", number), ("wrong check", level), ("astray", level))[min(checks, 2)]
                found.setdefault(of, []).append(1 - p[end - 2, digit].item())
                if checks < len(CHECKS):
                    event = "again" if checks else "check"
                    found.setdefault((event, level), []).append(p[end, words[checks]].item())
    return {of: statistics.fmean(values) for of, values in found.items()}, right

# ------------------------------------------------------------------------------------------------- quickstart

def quickstart(directory="toy"):
    """From nothing to a compared model, by the commands a user would type; what is there already is kept."""
    toy = Path(os.path.relpath(directory, HERE))  # the commands are run beside the scripts
    evaluate = f"torchrun --nproc_per_node 2 eval.py --data {toy}/eval.jsonl {' '.join(TOY_EVAL)}"
    steps = [  # what it does, command, what it leaves
        ("a tiny reasoning model that overthinks sums, made from scratch: 1 to 3 minutes",
         f"python test_opsdc.py toy {toy}", "eval.jsonl"),
        ("OPSDC: it learns to reason as if told v2: 1 to 2 minutes",
         f"torchrun --nproc_per_node 2 opsdc.py --model {toy}/model --data {toy}/train.jsonl --out {toy}/run "
         + " ".join(TOY_RUN), "run/model"),
        ("the model before: half a minute", f"{evaluate} --model {toy}/model --out {toy}/base", ""),
        ("the model before, told v2 in its prompt: half a minute",
         f"{evaluate} --model {toy}/model --instruction v2 --out {toy}/concise", ""),
        ("the trained model, told nothing: half a minute",
         f"{evaluate} --model {toy}/run/model --out {toy}/ours", ""),
        ("the three side by side: seconds",
         f"python eval.py compare {toy}/base {toy}/concise {toy}/ours --plot {toy}/compare.png", "")]
    for number, (what, command, leaves) in enumerate(steps, 1):
        print(f"\n# {number} of {len(steps)}: {what}")
        if leaves and (HERE / toy / leaves).exists():
            print(f"# {toy / leaves} is there already")
            continue
        if leaves == "run/model" and (HERE / toy / "run").exists():
            command += " --resume"  # what a kill left
        print(f"$ {command}", flush=True)
        words = command.replace("torchrun", "python -m torch.distributed.run").split()
        if subprocess.run([sys.executable, *words[1:]], env=ENVIRONMENT, cwd=HERE).returncode:
            sys.exit(f"quickstart: that command failed, see above; without {toy} it starts from nothing")

# ------------------------------------------------------------------------------------------------------ forks
# Ideas of neighbouring papers as patches of opsdc.py: (lines there, what takes their place).
# `python test_opsdc.py fork NAME FILE` writes the patched script, to be run in place of opsdc.py.

WEIGHT = "w = weights[at]  # here a fork weighs tokens by their entropies or divergence"
FORKS = {
    # arXiv 2605.06188: wrong rollouts only, which does damage there
    "incorrect": [('cfg.keep == "all" or r.correct', "not r.correct")],
    # arXiv 2605.13255: the more certain the teacher, the more a token weighs, with a floor
    "egrsd": [(WEIGHT, "w = weights[at] * torch.exp(-entropies[1]).clamp(min=0.1)")],
    # arXiv 2604.14084: only tokens where the student is uncertain, or certain and far from the teacher
    "tip": [(WEIGHT, "w = weights[at] * ((entropies[0] > 0.1) | (value > 0.1))")],
    # arXiv 2603.11178: four rollouts a problem, weighted by p (1 - p) of its pass rate p
    "paced": [
        ("at = range(step * batch_size, (step + 1) * batch_size)",
         "at = [k // 4 for k in range(step * batch_size, (step + 1) * batch_size)]"),
        ("    return [[1 / (len(rollouts) * len(r.ids))] * len(r.ids) for r in rollouts]",
         "    passed = {k.index: [r.correct for r in rollouts if r.index == k.index] for k in rollouts}\n"
         "    p = {i: sum(known) / len(known) for i, known in passed.items()}\n"
         "    return [[p[r.index] * (1 - p[r.index]) / (len(rollouts) * len(r.ids))] * len(r.ids)\n"
         "            for r in rollouts]")],
    # thetabar follows theta at every step; float32, since bfloat16 would round a hundredth away
    "ema": [
        ("p.detach().to(dtype or compute_dtype(), copy=True)", "p.detach().clone()"),
        ("    due = cfg.refresh_every and step % cfg.refresh_every == 0\n"
         "    return snapshot(model) if due else thetabar",
         "    theta = snapshot(model)\n"
         "    return {name: q.lerp(theta[name], 0.01) for name, q in thetabar.items()}")],
    # a larger model of the family, told to be brief, teaches (same tokenizer; run with --refresh_every 0)
    "larger": [
        ("    theta = snapshot(model, torch.float32)\n    copy_into(model, thetabar)\n",
         "    model = larger  # a module of its own, never swapped\n"),
        ("    copy_into(model, theta)\n", ""),
        ("    model = load_model(cfg, device)\n",
         "    model = load_model(cfg, device)\n"
         "    globals()[\"larger\"] = load_model(Config(model=\"Qwen/Qwen3-14B\"), device)\n")],
    # arXiv 2606.00755: a teacher with a temperature of its own, above 1 against a collapse of the entropy
    "temperature": [("t_v.log_softmax(-1)", "(t_v / 1.5).log_softmax(-1)")],
    # arXiv 2601.18734 (OPSD): no entry of the vocabulary gives more than 0.05 nats, nor then a gradient
    "clip": [
        ("    return value, p * (a - (p * a).sum(-1, keepdim=True))",
         "    terms = p * a\n"
         "    value, a = terms.clamp(max=0.05).sum(-1), (terms < 0.05) * (a + 1)\n"
         "    return value, p * (a - (p * a).sum(-1, keepdim=True))")],
    # rollouts from the head of the distribution, as models are used
    "topp": [("temperature=cfg.temperature)", "temperature=cfg.temperature, top_p=0.95, top_k=20)")],
    # the student learns to answer at once what the teacher is told to think about in brief
    "thinking": [("student_prompt(tokenizer, text, cfg.thinking, cfg.wrapper)",
                  "student_prompt(tokenizer, text, False, cfg.wrapper)")],
    # the metrics on wandb too: begun before the engine, as a missing login would end the run after a step
    "wandb": [
        ("import torch\n", "import torch\nimport wandb\n"),
        ("    engine = RolloutEngine(cfg)\n",
         "    if dist.get_rank() == 0:\n"
         "        wandb.init(project=\"opsdc\", config=asdict(cfg))\n"
         "    engine = RolloutEngine(cfg)\n"),
        ("    say(\"  \".join(form", "    wandb.log(metrics, step=metrics[\"step\"])\n    say(\"  \".join(form"),
        ("    sys.stdout.flush()\n    os._exit", "    wandb.finish(status)\n    sys.stdout.flush()\n    os._exit")],
    # the teacher is told the answer
    "answer": [("text, instruction, cfg.thinking",
                "text, f\"{instruction}\\n\\nThe answer is {answer}.\", cfg.thinking")],
}

def fork(names, file):
    """Write opsdc.py with the patches of `names` (joined by +) to `file`; returns the number of new lines."""
    if unknown := set(names.split("+")) - FORKS.keys():
        sys.exit(f"expected names of {', '.join(FORKS)}, joined by +; found {', '.join(unknown)}")
    source = before = (HERE / "opsdc.py").read_text()
    for old, new in (patch for name in names.split("+") for patch in FORKS[name]):
        assert source.count(old) == 1, f"{names}: opsdc.py has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    Path(file).write_text(source)
    new = sum(line[0] == "+" for line in difflib.ndiff(before.splitlines(), source.splitlines()))
    print(f"wrote {file}: opsdc.py with {new} other lines, to be run in its place")
    return new

# ----------------------------------------------------------------------------------------------------- claims
# The paper's claims at toy scale. `python test_opsdc.py claims toy` trains and evaluates every row with three
# seeds, by the commands a user would type, and prints the tables. What is finished already is not run again.

SEEDS = (0, 1, 2)
ONLY_HELP = "checks only help"  # rows of a second toy: without a further check that goes astray
M30 = "--refresh_every 30"      # half of the steps, as the paper's 50 of 100
CLAIMS = {  # row: options of opsdc.py after TOY_RUN, or None where nothing is trained; "told" is for eval.py
    "base": None, "base, told v1": None, "base, told v2": None,
    "frozen teacher": "", "M = 30": M30, "M = 30, told v2": None, "v1, M = 30": f"{M30} --instruction v1",
    "M = 15": "--refresh_every 15", "M = 6": "--refresh_every 6", "M = 1": "--refresh_every 1",
    "JSD": f"{M30} --divergence jsd", "forward KL": f"{M30} --divergence forward_kl",
    "rollouts cut at 25 %": f"{M30} --max_response_tokens 28",
    "temperature 0.5": f"{M30} --temperature 0.5", "temperature 1.5": f"{M30} --temperature 1.5",
    "correct only": f"{M30} --keep correct", "incorrect only": M30,  # by the fork
    f"{ONLY_HELP}: base": None, f"{ONLY_HELP}: frozen teacher": "", f"{ONLY_HELP}: M = 30": M30,
}
DRAWN = "frozen teacher"  # with an evaluation every 5 steps at seed 0, for the picture
EASY_AND_HARD = {"easy": LEVELS[:2], "hard": LEVELS[2:]}

def claim_toy(toy, row):
    """The toy that a row is about."""
    return toy / "only-help" if ONLY_HELP in row else toy

def claim_folder(toy, row, seed):
    return toy / "claims" / f"{re.sub('[^a-zA-Z0-9.]+', '-', row)}-{seed}"

def traced(*arguments):
    """opsdc.py with `arguments`, whose evaluations are of easy and of hard sums, sampled as TOY_EVAL."""
    validate = ev.validate
    ev.SAMPLING.update(temperature=1, top_p=1, top_k=0)
    ev.validate = lambda engine, tokenizer, jobs, cfg: {
        f"{name}_{part}": value for part, levels in EASY_AND_HARD.items() for name, value in validate(
            engine, tokenizer, [job for job in jobs if job["level"] in levels], cfg).items()}
    sys.argv = ["opsdc.py", *arguments]
    opsdc.main()

def train_claim(toy, row, seed):
    out, script, more = claim_folder(toy, row, seed), ["opsdc.py"], []
    if CLAIMS[row] is None or (out / "run/model").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if row == "incorrect only":
        fork("incorrect", out / "fork.py")
        script = [out / "fork.py"]
    if row == DRAWN and seed == 0:
        script = ["test_opsdc.py", "traced"]
        more = ["--eval_every", 5, "--eval_data", toy / "eval.jsonl", "--eval_samples", 2]
    succeed(*script[1:], *TOY_RUN, *CLAIMS[row].split(), "--model", claim_toy(toy, row) / "model", "--data",
            toy / "train.jsonl", "--out", out / "run", "--seed", seed, "--save_every", 1000, *more,
            script=script[0], timeout=3600)

def claim(toy, row, seed):
    """Trains and evaluates a row, unless that is done -> its records on eval.jsonl."""
    out, (trained, _, told) = claim_folder(toy, row, seed) / "eval", row.partition(", told ")
    train_claim(toy, trained, seed)
    ours = claim_folder(toy, trained, seed) / "run/model"
    if not (out / "summary.json").exists() or not ev.read_summary(out)["finished"]:
        succeed("--model", claim_toy(toy, row) / "model" if CLAIMS[trained] is None else ours, "--data",
                toy / "eval.jsonl", "--out", out, *TOY_EVAL, "--seed", seed,
                *["--instruction", told] * bool(told), script="eval.py", timeout=3600)
    return ev.read_run(out)[1]["eval"]

def entropy_over_training(toy, row, seeds):
    """Student's entropy, nats/token, mean of all seeds: first five steps -> last five."""
    runs = [metrics_of(claim_folder(toy, row, seed) / "run") for seed in seeds if CLAIMS[row] is not None]
    found = [[line["student_entropy"] for run in runs for line in run[part] if "loss" in line]
             for part in (slice(5), slice(-5, None))]
    return " -> ".join(f"{statistics.fmean(values):.3f}" for values in found if values)

def claims(directory="toy", *seeds):
    toy, seeds = Path(directory).resolve(), [int(seed) for seed in seeds] or SEEDS
    toys = [made for made in ((toy, 0), (claim_toy(toy, ONLY_HELP), 0, 0))  # folder, seed, going astray
            if not (made[0] / "eval.jsonl").exists()]
    jobs = [(row, seed) for seed in seeds for row in CLAIMS if "told" not in row]
    jobs += [(row, seed) for seed in seeds for row in CLAIMS if "told" in row]  # of models trained by then
    with ThreadPoolExecutor(2) as pool:  # a core each
        list(pool.map(lambda made: succeed("toy", *made, script="test_opsdc.py", timeout=3600), toys))
        records = dict(zip(jobs, pool.map(lambda job: claim(toy, *job), jobs)))
    spread = lambda values: (f"{statistics.fmean(values):.1f}"
                             + (f" ± {statistics.stdev(values):.1f}" if values[1:] else ""))
    table, wrong = [], []
    for row in CLAIMS:
        names = f"{ONLY_HELP}: base" if ONLY_HELP in row else "base", row
        base, ours = ([r for seed in seeds for r in records[name, seed]] for name in names)
        tokens, right = ([[ev.mean(records[name, seed], column) for seed in seeds] for name in names]
                         for column in ("tokens", "correct"))
        (*_, whole), *parts = ev.contrast(base, ours)
        table.append([row, f"`{CLAIMS[row]}`" if CLAIMS[row] else "", spread([100 * x for x in right[1]]),
                      ev.percent(*whole["change"], sign="+"), spread(tokens[1]),
                      spread([100 * (1 - y / x) for x, y in zip(*tokens)]),
                      " / ".join(f"{100 * stats['accuracy']:.1f}" for _, _, stats, _ in parts),
                      " / ".join(f"{100 * versus['reduction'][0]:.0f}" for *_, versus in parts),
                      entropy_over_training(toy, row, seeds)])
        wrong.append([row, *faults(toy, ours)])
    print(f"{len(seeds)} seeds, mean ± standard deviation; in brackets the 95 % paired bootstrap interval "
          f"over {len(ev.by_problem(base))} problems, all seeds together\n")
    print(ev.markdown(["toy", "options", "accuracy, %", "change, points", "tokens", "reduction, %",
                       "accuracy at 3 / 4 / 5 / 6 terms", "reduction there", "entropy, nats/token"], table))
    print("\nWhat wrong responses do wrong, % of all responses, easy / hard sums\n")
    print(ev.markdown(["toy", *FAULTS, "steps checked, %", "further checks a step"], wrong))

FAULTS = ("a slip unchecked", "a further check astray", "a term left out", "a term again", "other terms",
          "else")

def fault(response, problem):
    """What is wrong in a wrong response: one of FAULTS."""
    lines = [line for line in map(LINE.search, response.split("\n")) if line]
    steps, terms = [line[3] + line[4] for line in lines if not line[1]], problem.split()[3:]
    if steps != terms:
        if steps[:len(terms)] == terms:
            return "a term again"
        return "a term left out" if len(steps) < len(terms) else "other terms"
    for line, after in itertools.pairwise([*lines, None]):  # what the thought goes on from
        if not (after and after[1]) and (int(line[2]) + int(line[4]) - int(line[0][-1])) % 10:
            return {None: FAULTS[0], "check": "else"}.get(line[1], FAULTS[1])
    return "else"

def faults(toy, records):
    """Of easy / hard sums: shares of all responses that are wrong, by fault, and of steps checked, in %;
    checks after a step's first."""
    problems = {row["id"]: row["problem"] for row in ev.load_problems(str(toy / "eval.jsonl"))}
    columns = []
    for levels in EASY_AND_HARD.values():
        part = [record for record in records if record["level"] in levels]
        found = [fault(r["response"], problems[r["id"]]) for r in part if not r["correct"]]
        lines = [LINE.search(line) for r in part for line in r["response"].split("\n")]
        words = [line[1] for line in lines if line]
        steps, first = max(1, words.count(None)), words.count("check")
        further = len(words) - words.count(None) - first
        columns.append([f"{100 * found.count(name) / len(part):.1f}" for name in FAULTS]
                       + [f"{100 * first / steps:.0f}", f"{further / steps:.2f}"])
    return [" / ".join(cells) for cells in zip(*columns)]

def picture(directory="toy", file="toy.png"):
    """Accuracy against mean tokens of easy and of hard sums: on the way with a frozen teacher, and at the end
    of other rows."""
    toy, pyplot = Path(directory).resolve(), ev.pyplot()
    figure, ax = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    refreshed = [row for row in CLAIMS if row.startswith("M = ") and "told" not in row]
    marks = {"o": ("before", ["base"]), "s": ("after, told nothing", [DRAWN]),
             "D": ("after, teacher refreshed every 30, 15, 6, 1 steps", refreshed),
             "*": ("before, told v1", ["base, told v1"]), "P": ("before, told v2", ["base, told v2"])}

    def place(row, levels):
        records = ev.read_run(claim_folder(toy, row, 0) / "eval")[1]["eval"]
        part = [record for record in records if record["level"] in levels]
        return ev.mean(part, "tokens"), 100 * ev.mean(part, "correct")
    for color, (name, levels) in zip(("tab:blue", "tab:red"), EASY_AND_HARD.items()):
        way = [(line[f"eval_tokens_{name}"], 100 * line[f"eval_accuracy_{name}"])
               for line in metrics_of(claim_folder(toy, DRAWN, 0) / "run") if f"eval_tokens_{name}" in line]
        ax.plot(*zip(place("base", levels), *way[1:], place(DRAWN, levels)), ".-", color=color)
        ax.plot(*zip(*(place(row, levels) for row in [DRAWN, *refreshed])), ":", color=color)
        for marker, (_, rows) in marks.items():
            ax.plot(*zip(*(place(row, levels) for row in rows)), marker, color=color, markeredgecolor="white",
                    markersize=9 if marker == "D" else 14)
        ax.annotate(f"{name} sums", place("base", levels), (-100, -5), textcoords="offset points",
                    color=color, fontsize=15)
    for marker, (label, _) in marks.items():
        ax.plot([], [], marker, color="gray", markersize=11, label=label)
    ax.set_xlabel("mean tokens of a response", fontsize=14)
    ax.set_ylabel("right answers, %", fontsize=14)
    ax.tick_params(labelsize=13)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=13, loc="lower left")
    figure.savefig(file, dpi=100)
    print(f"wrote {file}")

# ---------------------------------------------------------------------------------------------- the objective

def exact_divergence(s, t, kind):
    """The divergence of each row by torch.distributions, in the dtype given (float64 in the tests)."""
    p, q = (torch.distributions.Categorical(logits=x) for x in (s, t))
    m = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    kl = torch.distributions.kl_divergence
    return dict(reverse_kl=kl(p, q), forward_kl=kl(q, p), jsd=(kl(p, m) + kl(q, m)) / 2)[kind]

def objective_inputs(N=37, V=301, d=16, dtype=torch.float32, apart=0.1):
    torch.manual_seed(0)
    hidden, head = torch.randn(N, d), torch.randn(V, d) / 2
    return [x.to(dtype) for x in (hidden, head, hidden + apart * torch.randn(N, d),
                                  head + apart * torch.randn(V, d) / 2)] + [torch.rand(N) / N]

def exact_loss(inputs, kind):
    """Loss and both gradients in float64 with autograd over the whole [N, V]."""
    hs, ws, ht, wt, weights = (x.double() for x in inputs)
    hs.requires_grad_(), ws.requires_grad_()
    loss = (weights * exact_divergence(hs @ ws.T, ht @ wt.T, kind)).sum()
    return loss.item(), *torch.autograd.grad(loss, (hs, ws))

def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()

def test_reverse_kl_is_kl_of_student_from_teacher():
    s, t = torch.randn(20, 500), torch.randn(20, 500)
    exact = exact_divergence(s.double(), t.double(), "reverse_kl")
    assert torch.allclose(opsdc.reverse_kl(s, t).double(), exact, rtol=1e-5)
    assert not torch.allclose(opsdc.reverse_kl(t, s).double(), exact, rtol=1e-2)
    assert opsdc.reverse_kl(s.bfloat16(), t.bfloat16()).dtype == torch.float32

@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("chunk", [1, 5, 37, 256])
def test_loss_and_gradients_equal_float64(kind, chunk):
    """Errors of 6e-7 to 9e-7 with every kernel; logits are rounded at 5e-7, log p - log q is about 1."""
    inputs = objective_inputs(apart=0.3)
    hs, ws = inputs[0].requires_grad_(), inputs[1].requires_grad_()
    loss, _ = opsdc.distill_loss(hs, ws, *inputs[2:], divergence=kind, chunk=chunk)
    (3 * loss).backward()
    exact, grad_hidden, grad_head = exact_loss([x.detach() for x in inputs], kind)
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    assert relative_error(hs.grad, 3 * grad_hidden) < 1e-5 and relative_error(ws.grad, 3 * grad_head) < 1e-5
    assert inputs[2].grad is None and inputs[3].grad is None

@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("scale, cap", [(0.25, None), (1.0, 2.0), (3.0, 5.0)])
def test_loss_and_gradients_equal_float64_through_scale_and_soft_cap(kind, scale, cap):
    """Logits of size 2 to 24 under the caps, so that the slope runs from 1 to 1e-4."""
    inputs = objective_inputs()
    hs, ws = inputs[0].requires_grad_(), inputs[1].requires_grad_()
    loss, stats = opsdc.distill_loss(hs, ws, *inputs[2:], divergence=kind, chunk=7, scale=scale, cap=cap,
                                     tokens=torch.arange(37))
    loss.backward()
    h, w, th, tw, weights = (x.detach().double() for x in inputs)
    h.requires_grad_(), w.requires_grad_()
    s, t = ((cap or 1e9) * torch.tanh(scale * (a @ b.T) / (cap or 1e9)) for a, b in ((h, w), (th, tw)))
    exact = (weights * exact_divergence(s, t, kind)).sum()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert relative_error(hs.grad, h.grad) < 1e-5 and relative_error(ws.grad, w.grad) < 1e-5
    assert torch.allclose(stats["logprob"].double(), s.log_softmax(-1).diagonal(), atol=1e-5)

@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("apart, kl, bound", [(0.006, 5e-4, 2e-6), (0.002, 1e-4, 1e-5), (0.0, 1e-6, None)])
def test_small_divergence_between_bfloat16_models_keeps_its_value_and_gradient(kind, apart, kl, bound):
    """What makes training work late in a run. Float32 logits of size 5 are rounded at 5e-7, at random from
    place to place, beside a = log p - log q of size 0.014 at KL 1e-4: measured over 1000 tokens an error of
    the loss of 1e-7 to 5e-7 with every kernel, where terms that cancel are wrong by 1.5e-4."""
    inputs = objective_inputs(N=1000, V=2000, d=64, dtype=torch.bfloat16, apart=apart)
    hs, ws = inputs[0].requires_grad_(), inputs[1].requires_grad_()
    loss, stats = opsdc.distill_loss(hs, ws, *inputs[2:], divergence=kind)
    loss.backward()
    exact, grad_hidden, grad_head = exact_loss([x.detach() for x in inputs], kind)
    assert 0 <= stats["kl"] <= 1.2 * kl
    if bound is None:  # the same model twice
        assert loss.item() == pytest.approx(0, abs=1e-11) and ws.grad.norm() < 1e-5
        return
    error = abs(loss.item() / exact - 1)
    print(f"{torch.backends.cpu.get_cpu_capability()} {kind} {stats['kl']:.1e}: loss {error:.1e}")
    assert error < bound
    # Beside the exact gradient rounded as it is, to 8 bits: what is left are the few values whose float32
    # errors fall on the other side of the rounding's edge; 2e-4 to 5e-4 measured with every kernel.
    for x, grad in ((ws, grad_head), (hs, grad_hidden)):
        rounded = relative_error(x.grad, grad.bfloat16())
        print(f"gradient {rounded:.1e} ({relative_error(x.grad, grad):.1e} with rounding)")
        assert x.grad.dtype == torch.bfloat16 and rounded < 2.5e-3

@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_divergence_is_never_negative_and_finite_far_apart(kind):
    """Rows that agree to the last bit or differ by a hundred nats: one side's probability underflows there,
    and exp(-a) overflows."""
    torch.manual_seed(0)
    s = torch.randn(300, 400) * torch.logspace(-6, 2, 300)[:, None]
    t = s + torch.randn(300, 400) * torch.logspace(-8, 2, 300)[torch.randperm(300)][:, None]
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    value, gradient = opsdc.divergence_and_gradient(log_p.exp(), log_p, log_q.exp(), log_q, kind)
    exact = exact_divergence(s.double(), t.double(), kind)
    assert (value >= 0).all() and gradient.isfinite().all()
    assert torch.allclose(value.double(), exact, rtol=1e-4, atol=1e-9)

def test_products_on_tensor_cores(monkeypatch):
    """What a GPU computes, with its roundings: products of bfloat16 matrices, summed in float32. At a KL of
    0.0017 the loss is what it is on a CPU, and the gradients of head and hidden states are off by 0.25 %:
    sqrt(2) times 0.17 %, which is what rounding a matrix to bfloat16 costs, once before and once after."""
    inputs = objective_inputs(N=1000, V=2000, d=64, dtype=torch.bfloat16, apart=0.0118)
    precision, addmm, products = torch.get_float32_matmul_precision(), torch.addmm, []

    def tensor_cores(old, a, b, beta, out_dtype, out):
        meta = [x.to("meta") for x in (old, a, b)]  # torch has this call, and takes these dtypes
        assert addmm(*meta, beta=beta, out_dtype=out_dtype, out=meta[0]).dtype == torch.float32
        products.append((a.dtype, b.dtype, out.dtype))
        return addmm(old, a.float(), b.float(), beta=beta, out=out)

    def loss_and_gradients():
        hs, ws = (x.clone().requires_grad_() for x in inputs[:2])
        loss, stats = opsdc.distill_loss(hs, ws, *inputs[2:], chunk=250)
        loss.backward()
        return loss.item(), hs.grad, ws.grad, stats["kl"].item()

    cpu = loss_and_gradients()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", tensor_cores)
        patch.setattr(torch.Tensor, "is_cuda", True)
        gpu = loss_and_gradients()
    assert products == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 4 * 4  # of four chunks
    loss, *exact = exact_loss(inputs, "reverse_kl")
    assert 0.0015 < gpu[3] < 0.002 and gpu[0] == cpu[0] == pytest.approx(loss, rel=3e-6)
    for name, a, b, grad in zip(("hidden", "head"), cpu[1:3], gpu[1:3], exact):
        print(f"{name}: {relative_error(a, grad):.2%} in float32, {relative_error(b, grad):.2%} as on a GPU")
        # the first beside the exact one, rounded alike; the second has a rounding more, whatever the kernels
        assert relative_error(a, grad.bfloat16()) < 0.0025 and relative_error(b, grad) < 0.003
    assert torch.get_float32_matmul_precision() == precision and not torch.backends.cuda.matmul.allow_tf32

def test_stats():
    inputs = objective_inputs()
    tokens = torch.randint(301, (37,))
    loss, stats = opsdc.distill_loss(*inputs, tokens=tokens)
    p, q = (torch.distributions.Categorical(logits=(inputs[i] @ inputs[i + 1].T).double()) for i in (0, 2))
    assert stats["kl"].item() == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item(),
                                               rel=1e-5)
    assert stats["student_entropy"].item() == pytest.approx(p.entropy().mean().item(), rel=1e-5)
    assert stats["teacher_entropy"].item() == pytest.approx(q.entropy().mean().item(), rel=1e-5)
    assert torch.allclose(stats["logprob"].double(), p.log_prob(tokens), atol=1e-5)
    assert not any(value.requires_grad for value in stats.values())

def test_never_holds_logits_of_all_tokens():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in [result] if isinstance(x, torch.Tensor))])
            return result

    inputs = objective_inputs(N=256, V=301)
    with Largest() as largest:
        opsdc.distill_loss(inputs[0].requires_grad_(), inputs[1].requires_grad_(), *inputs[2:],
                           chunk=16)[0].backward()
    assert largest.numel == 2 * 16 * 301  # the logits of one chunk, student's and teacher's

@pytest.mark.parametrize("kernels, needs", [("default", ""), ("avx2", "avx2"), ("avx512", "avx512f")])
def test_the_objective_holds_with_every_kernel_of_this_processor(kernels, needs):
    """torch picks its kernels by ATEN_CPU_CAPABILITY when it is imported: the tests above, once for each."""
    if needs not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {kernels}")
    names = [name for name in globals() if re.search(
        "^test_(reverse_kl|loss_and_gradients_equal|small_div|divergence_is|stats|forks_of_the_obj)", name)]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *(f"{__file__}::{name}" for name in names)],
                          env=ENVIRONMENT | {"ATEN_CPU_CAPABILITY": kernels}, capture_output=True, text=True)
    assert done.returncode == 0 and len(names) == 7, done.stdout[-3000:]

# ------------------------------------------------------------------------------------------- prompts and data

def test_prompts_are_the_papers(tmp_path):
    tokenizer = make_tokenizer(["text"], QWEN_TEMPLATE)
    form = ("The last line of your response should be of the form Answer: $Answer (without quotes) where "
            "$Answer is the answer to the problem.")
    remember = 'Remember to put your answer on its own line after "Answer:".'
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    student = f"Solve the following math problem step by step. {form}\n\n1+1?\n\n{remember}"
    assert tokenizer.decode(opsdc.student_prompt(tokenizer, "1+1?")) == chat.format(student)
    v1 = ("Solve the following math problem concisely and correctly. Be direct: avoid unnecessary "
          "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
          "needed to reach the answer.")
    teacher = f"{v1}\n\n{form}\n\n1+1?\n\n{remember}"
    assert (tokenizer.decode(opsdc.teacher_prompt(tokenizer, "1+1?", opsdc.read_instruction("v1")))
            == chat.format(teacher))
    v2 = opsdc.read_instruction("v2")
    assert v2.startswith("Solve the following math problem concisely and correctly. Prioritize a correct "
                         "final answer above brevity. For straightforward")
    assert v2.endswith("and a brief check of the final answer. Never omit a step that the answer depends on.")
    (tmp_path / "c.txt").write_text("Be brief.\n")
    assert (opsdc.read_instruction(f"@{tmp_path / 'c.txt'}") == opsdc.read_instruction("Be brief.")
            == "Be brief.")

def test_thinking_reaches_templates_that_know_it():
    qwen, r1 = make_tokenizer(["text"], QWEN_TEMPLATE), make_tokenizer(["text"], R1_TEMPLATE)
    assert qwen.decode(opsdc.student_prompt(qwen, "1+1?", thinking=False)).endswith("<think>\n\n</think>\n\n")
    assert qwen.decode(opsdc.student_prompt(qwen, "1+1?", thinking=True)).endswith("<|im_start|>assistant\n")
    assert opsdc.student_prompt(r1, "1+1?", thinking=True) == opsdc.student_prompt(r1, "1+1?", thinking=False)
    assert r1.decode(opsdc.student_prompt(r1, "1+1?")).endswith("<|Assistant|><think>\n")

def turns(*roles):
    return [dict(role=role, content=f"text {i}") for i, role in enumerate(roles)]

WRAPPED = opsdc.WRAPPER_HEAD + "1+1?" + opsdc.WRAPPER_TAIL
ROWS = [  # row, what --wrapper math reads: (problem, answer) or words of the error; with none if another
    (dict(problem="1+1?", answer="2", solution="1+1 makes 2"), ("1+1?", "2")),
    (dict(question="1+1?", answer=2), ("1+1?", "2")),
    (dict(prompt=f" {WRAPPED}\n"), ("1+1?", None), (f" {WRAPPED}\n", None)),
    (dict(prompt=WRAPPED, solution="so \\boxed{2}"), ("1+1?", "2"), (WRAPPED, "2")),
    (dict(prompt=[dict(role="user", content=WRAPPED)], reward_model=dict(ground_truth="2")), ("1+1?", "2"),
     (WRAPPED, "2")),
    (dict(prompt="1+1?", problem=" ", answer="", solution=None, reward_model=None), ("1+1?", None)),
    (dict(prompt=" 1+1?\n", answer=math.nan), ("1+1?", None), (" 1+1?\n", None)),
    (dict(problem="x", answer="3 + 4 = <<3+4=7>>7\n#### 7"), ("x", "7")),
    (dict(problem="x", answer="\\[ \\boxed{\\frac{1}{2}}. \\]"), ("x", "\\frac{1}{2}")),
    (dict(problem="x", answer=True), ("x", "True")),
    (dict(problem="x", answer=1e22), ("x", "10000000000000000000000")),
    (dict(problem="x", answer=0), ("x", "0")),
    (dict(problem="x", answer=1e-7), ("x", "0.0000001")),
    (dict(problem="x", answer=10 ** 30 + 1), ("x", "1" + 29 * "0" + "1")),
    (dict(problem="x", answer="[1, 2)"), ("x", "[1, 2)")),
    (dict(problem="x", answer="[1, 2]"), ("x", "[1, 2]")),
    (dict(problem="x", answer="{1, 2}"), ("x", "{1, 2}")),
    (dict(problem="x", answer='["2"]'), ("x", "2")),
    (dict(problem="x", reward_model='{"ground_truth": 2, "style": "rule"}'), ("x", "2")),
    (dict(prompt=json.dumps(turns("user")), answer=2), ("text 0", "2")),
    (dict(prompt=turns("system", "user")), (turns("system", "user"), None)),
    (dict(prompt=json.dumps(turns("system", "user"))), (turns("system", "user"), None)),
    (dict(prompt=turns("user", "assistant", "user")),
     "field prompt: expected the user's turn last.*--wrapper none takes .* assistant, user",
     (turns("user", "assistant", "user"), None)),
    (dict(text="1+1?"), "here: expected a field problem, prompt or question, found text"),
    (dict(problem="", question=None), "expected a field problem, .* found problem, question"),
    (dict(problem=" ", answer="3"), "expected a field problem"),
    (dict(prompt=[]), "expected a field problem"),
    (dict(prompt=[dict(role="user", content=" ")]), "expected a field problem"),
    (dict(problem=5), "field problem: expected a text, or messages .* found 5"),
    (dict(problem=dict(role="user", content="x")), "field problem: expected a text, or messages .* found {"),
    (dict(prompt=[turn | dict(at=datetime.datetime.now()) for turn in turns("user")]), "field prompt: float.*"),
    (dict(prompt=["text"]), "field prompt: expected a text, or messages with .*, found ..text'"),
    (dict(prompt=[dict(role="user", content=["text"])]), "expected a text, or messages with .* found .{"),
    (dict(prompt=[{"from": "human", "value": "x"}]), "expected a text, or messages with .* found .{'from'"),
    (dict(prompt=turns("user", "assistant")), "expected the user's turn last, .* user, assistant"),
    (dict(prompt=turns("system")), "expected a field problem"),
    (dict(prompt=json.dumps([dict(name="Bob") | turn for turn in turns("user")])), ("text 0", None)),
    (dict(prompt='[{"name": "Bob", "role": "x"}] as CSV?'), ('[{"name": "Bob", "role": "x"}] as CSV?', None)),
    (dict(prompt='[{"from": "human", "value": "x"}]'), "field prompt: expected a text, or messages"),
    (dict(prompt=str(turns("user"))), "field prompt: expected a JSON object, found \"..'role': 'user'"),
    (dict(problem="a \ud800"), "field problem: .*surrogates not allowed"),
    (dict(prompt=[dict(role="user", content="a \ud800")]), "field prompt: .*surrogates not allowed"),
    (dict(problem="x", answer=["2", "3"]), "field answer: expected a text, found ..2', '3'"),
    (dict(problem="x", answer="['2', '3']"), "field answer: expected a JSON object, found"),
    (dict(problem="x", answer='["2", "3"]'), "field answer: expected a text"),
    (dict(problem="x", answer=dict(value=2)), "field answer: expected a text"),
    (dict(problem="x", solution=b"2"), "field solution: expected a text"),
    (dict(problem="x", reward_model="rule"), "field reward_model: expected a JSON object, found 'rule'"),
    (dict(problem="x", reward_model=["2"]), "field reward_model: expected an object with ground_truth"),
    (dict(problem="x", reward_model=dict(ground_truth=["2", "3"])), "field reward_model: expected a text"),
]

@pytest.mark.parametrize("row, math_, none", [(*case, case[-1])[:3] for case in ROWS])
def test_a_row_is_read_or_refused_by_name(row, math_, none):
    for wrapper, expected in (("math", math_), ("none", none)):
        if isinstance(expected, tuple):
            assert (opsdc.read_problem(row, "here", wrapper), ev.read_answer(row, "here")) == expected
        else:
            with pytest.raises(ValueError, match=expected) as error:
                opsdc.read_problem(row, "here", wrapper)
                ev.read_answer(row, "here")
            assert str(error.value).startswith("here")

def test_conversations_keep_their_turns_and_only_the_last_is_wrapped():
    tokenizer = make_tokenizer(["text"], QWEN_TEMPLATE)
    decode = lambda ids: tokenizer.decode(ids)
    chat = turns("system", "user", "assistant", "user")
    head = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat[:-1])
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert (decode(opsdc.student_prompt(tokenizer, chat, wrapper="none"))
            == head + "<|im_start|>user\ntext 3" + tail)
    assert (decode(opsdc.teacher_prompt(tokenizer, chat, "Be brief.", wrapper="none"))
            == head + "<|im_start|>user\nBe brief.\n\ntext 3" + tail)
    assert (decode(opsdc.student_prompt(tokenizer, turns("system", "user")))
            == "<|im_start|>system\ntext 0<|im_end|>\n<|im_start|>user\n" + WRAPPED.replace("1+1?", "text 1")
            + tail)
    assert opsdc.student_prompt(tokenizer, "x", wrapper="none") == opsdc.chat_ids(tokenizer, "x", True)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="chat template fails on .*text 0.*: no system here"):
        opsdc.student_prompt(tokenizer, chat)

def test_a_template_with_a_date_keeps_the_day_it_is_given():
    tokenizer = make_tokenizer(["text"], "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    opsdc.fix_date(tokenizer, "2024-07-26")
    assert tokenizer.decode(opsdc.student_prompt(tokenizer, "x", wrapper="none")) == "26 Jul 2024x"

def as_file(directory, name, content):
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)

def as_parquet(rows):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()

def test_files_of_all_formats_read_alike(tmp_path):
    rows = [dict(problem="a, \u2028b\n?", answer="055"), dict(problem="\u00e9", answer="0.10")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows)
    table = 'problem,answer\r\n"a, \u2028b\n?",055\r\n\r\n\u00e9,0.10\r\n'
    contents = {"jsonl": lines, "json": json.dumps(rows, indent=1), "csv": table, "parquet": as_parquet(rows)}
    for kind, content in contents.items():
        mark = "" if kind == "parquet" else "\ufeff"
        for name in (f"x.{kind}", f"x.{kind}.gz", f"{kind}/train.{kind}"):
            file = as_file(tmp_path, name, mark + content if mark else content)
            source = str(tmp_path / kind) if "/" in name else file
            wheres, found = zip(*opsdc.read_rows(source))
            assert list(found) == rows and wheres[0].startswith(f"{file}, "), (name, found)
    assert wheres == (f"{file}, row 1", f"{file}, row 2")
    assert [where for where, _ in opsdc.read_rows(str(tmp_path / "x.csv"))][1].endswith("x.csv, line 5")
    assert [where for where, _ in opsdc.read_rows(str(tmp_path / "x.jsonl"))][1].endswith("x.jsonl, line 3")
    assert list(opsdc.read_rows(as_file(tmp_path, "array.jsonl", json.dumps(rows))))[1][1] == rows[1]
    as_file(tmp_path, "jsonl/test.jsonl", '{"problem": "c"}')  # another split
    assert len(list(opsdc.read_rows(str(tmp_path / "jsonl")))) == 2
    assert list(opsdc.read_rows(str(tmp_path / "jsonl") + "::test"))[0][1] == dict(problem="c")
    number, = opsdc.read_rows(as_file(tmp_path, "n.jsonl", '{"problem": "x", "answer": 0.10}'))
    assert ev.read_answer(number[1], "here") == "0.10"

@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", '{"problem": "x"}\n{"problem"\n',
     "x.jsonl: line 2, expected a JSON object, found '{\"problem\"'"),
    ("x.jsonl", "5\n", "x.jsonl: line 1: expected a JSON object, .* found 5"),
    ("x.json", '[{"problem": "x"}, 5]', "x.json: row 2: expected a JSON object"),
    ("x.jsonl", "[" * 100000, "expected a JSON object"),
    ("x.jsonl", '{"problem": "\u00e9"}'.encode("latin-1"), "x.jsonl: expected the encoding UTF-8"),
    ("x.csv", "problem\n\u00e9\n".encode("utf-16"), "x.csv: expected the encoding UTF-8"),
    ("x.csv", "problem,answer\nx,1,2\n", "x.csv: line 2: expected .* a cell for each column"),
    ("x.parquet", "version https://git-lfs", "x.parquet: .*Parquet magic bytes not found"),
    ("x.parquet", "", "x.parquet: .* 0 bytes"),
    ("x.txt", "x", "x.txt: expected a file .jsonl, .json, .csv or .parquet"),
])
def test_files_that_cannot_be_read_are_named(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(opsdc.read_rows(as_file(tmp_path, name, content)))

@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (3, 8)])
def test_batch_at_covers_each_epoch_once(n, batch_size):
    stream = [i for step in range(n) for i in opsdc.batch_at(n, step, batch_size, seed=1)]
    epochs = [stream[k:k + n] for k in range(0, len(stream), n)]
    assert len(stream) == n * batch_size and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew
    assert (opsdc.batch_at(n, 5, batch_size, 1) == opsdc.batch_at(n, 5, batch_size, 1)
            != opsdc.batch_at(n, 5, batch_size, 2))

# ---------------------------------------------------------------------------------------------- micro-batches

@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_micro_batches_hold_every_sequence_once(world, budget):
    lengths = [9, 3, 8, 4, 4, 7, 1]
    ranks = [opsdc.micro_batches(lengths, budget, rank, world) for rank in range(world)]
    assert sorted(i for rank in ranks for group in rank for i in group) == list(range(7))
    # FSDP's collectives are entered by all ranks equally often
    assert len({len(rank) for rank in ranks}) == 1
    for group in (group for rank in ranks for group in rank if len(group) > 1):
        assert max(lengths[i] for i in group) * len(group) <= budget

def test_little_padding_and_even_ranks_on_a_long_tailed_batch():
    torch.manual_seed(0)
    # log-normal, mean about 4000
    lengths = (torch.randn(20, 32) * 0.6 + 8.2).exp().clamp(max=8192).int().tolist()
    padded, real, per_rank = 0, 0, []
    for batch in lengths:
        ranks = [opsdc.micro_batches(batch, 16384, rank, 8) for rank in range(8)]
        sizes = [sum(len(g) * max(batch[i] for i in g) for g in rank if g) for rank in ranks]
        padded, real = padded + sum(sizes), real + sum(batch)
        per_rank.append(max(sizes) / (sum(sizes) / 8))
    print(f"padding {1 - real / padded:.1%}, busiest rank {sum(per_rank) / 20:.2f} x the mean")
    assert 1 - real / padded < 0.10

def test_right_pad_marks_the_places_that_predict_the_response():
    inputs, predicts = opsdc.right_pad([[5, 6, 7], [1]], [[8, 9], [2]], "cpu")
    assert inputs.tolist() == [[5, 6, 7, 8], [1, 0, 0, 0]]
    assert predicts.tolist() == [2, 3, 4]  # 7 -> 8, 8 -> 9; in the second row 1 -> 2

# -------------------------------------------------------------------------------- student, teacher, gradients
# Five rollouts (a cut one, a single token, lengths far apart) under prompts of unequal length, and a teacher
# whose weights differ from the student's. `python test_opsdc.py gradients MODEL FILE` computes loss and
# gradients as opsdc.py does, on as many ranks as torchrun gives it; the reference is the unsharded model in
# float64, one unpadded sequence at a time.

def fixed_batch(tokenizer):
    texts = ["1+1?", "What is the sum of the first hundred positive integers?", "2+2?", "x", "Find all n."]
    problems = [opsdc.Problem(x, None, opsdc.student_prompt(tokenizer, x),
                              opsdc.teacher_prompt(tokenizer, x, opsdc.INSTRUCTIONS["v1"])) for x in texts]
    torch.manual_seed(1)
    lengths = [7, 90, 1, 33, 20]
    ids = [torch.randint(5, len(tokenizer), (n,)).tolist() for n in lengths]
    return problems, [opsdc.Rollout(i, y, [-1.0] * len(y), finished=i != 1) for i, y in enumerate(ids)]

def other_weights(parameters):
    """A thetabar that is not theta, the same function of each weight however it is sharded."""
    return {name: p.detach() * 1.1 + 0.01 for name, p in parameters}

def gradients(model_path, file, *settings):
    """Worker: for each 'dtype,micro_batch_tokens,loss_chunk' of `settings`, loss and full gradients; and
    whether theta came back."""
    device = opsdc.start_processes()
    opsdc.MAX_GAP = math.inf  # no engine here, hence no logprobs to agree with
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(model_path))
    found = []
    for dtype, micro, chunk in (setting.split(",") for setting in settings):
        opsdc.compute_dtype = lambda: getattr(torch, dtype)
        model = opsdc.load_model(opsdc.Config(model=model_path), device)
        theta = {name: p.full_tensor().clone() for name, p in model.lm.named_parameters()}
        thetabar = other_weights(model.lm.named_parameters())
        cfg = opsdc.Config(model=model_path, micro_batch_tokens=int(micro), loss_chunk=int(chunk))
        batches = opsdc.make_micro_batches(rollouts, problems, device, cfg)
        hidden, head = opsdc.teacher_pass(model, thetabar, batches)
        same = all(torch.equal(p.full_tensor(), theta[name]) for name, p in model.lm.named_parameters())
        objective = opsdc.student_pass(model, batches, hidden, head, cfg)
        grads = {name: p.grad.full_tensor() for name, p in model.lm.named_parameters()}
        model.zero_grad()
        found.append(dict(objective=objective, grads=grads, theta_back=same, head=head,
                          micro_batches=len(batches),
                          mesh=next(model.parameters()).device_mesh.mesh_dim_names))
    if torch.distributed.get_rank() == 0:
        torch.save(found, file)
    torch.distributed.destroy_process_group()

def exact_objective(student, teacher, problems, rollouts):
    """The loss written from the formula: no padding, no shards, torch.distributions."""
    loss = 0
    for rollout in rollouts:
        problem, y = problems[rollout.index], rollout.ids
        s = student(torch.tensor([problem.student + y])).logits[0]
        with torch.no_grad():
            t = teacher(torch.tensor([problem.teacher + y])).logits[0]
        for k in range(len(y)):
            kl = exact_divergence(s[len(problem.student) + k - 1], t[len(problem.teacher) + k - 1],
                                  "reverse_kl")
            loss = loss + kl / (len(rollouts) * len(y))
    return loss

def exact_gradients(model_path):
    """Loss and gradients in float64."""
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(model_path))
    student, teacher = (AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
                        for _ in range(2))
    weights = {name: value.float() for name, value in other_weights(student.named_parameters()).items()}
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            p.copy_(weights[name])
    loss = exact_objective(student, teacher, problems, rollouts)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}

def check_gradients(results, exact, grads):
    for result in results:
        assert result["theta_back"]
        assert result["objective"]["loss"] == pytest.approx(exact, rel=1e-5)
        assert result["grads"].keys() == grads.keys()
        for name, grad in grads.items():
            assert relative_error(result["grads"][name], grad) < 1e-4, name

# One sequence a micro-batch; some; all that fit: each with another chunk of the loss.
CUTS = "float32,1,1000", "float32,700,7", "float32,100000,1000"

@pytest.mark.parametrize("family, ranks", [("qwen3", 1), ("llama", 2)], indirect=["family"])
def test_loss_and_gradients_of_the_sharded_model_equal_float64(random_model, ranks, tmp_path):
    """And, as it runs on GPUs: bfloat16 activations, float32 weights of the tokens, logits, gradients and
    masters."""
    succeed("gradients", random_model, tmp_path / "found.pt", *CUTS, "bfloat16,100000,1000", ranks=ranks,
            script="test_opsdc.py")
    *results, rounded = torch.load(tmp_path / "found.pt", weights_only=False)
    exact, grads = exact_gradients(random_model)
    check_gradients(results, exact, grads)
    assert len({r["micro_batches"] for r in results}) == 3
    assert rounded["theta_back"] and rounded["objective"]["loss"] == pytest.approx(exact, rel=1e-2)
    assert {grad.dtype for grad in rounded["grads"].values()} == {torch.float32}
    whole = lambda gradients: torch.cat([gradients[name].flatten() for name in grads])
    print(f"bfloat16: {relative_error(whole(rounded['grads']), whole(grads)):.4f}")
    assert relative_error(whole(rounded["grads"]), whole(grads)) < 0.05

def test_two_nodes_shard_within_and_replicate_across(tmp_path):
    """2 x 2 ranks on this machine, each pair under a torchrun of its own, give the same gradients."""
    model = make_model(tmp_path / "m", "qwen3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2",
              "--master_addr", "127.0.0.1", "--master_port", str(port), "--node_rank"]
    worker = [str(HERE / "test_opsdc.py"), "gradients", str(model), str(tmp_path / "found.pt"),
              CUTS[1]]
    nodes = [subprocess.Popen([*launch, str(node), *worker], env=ENVIRONMENT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for node in range(2)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    result, = torch.load(tmp_path / "found.pt", weights_only=False)
    check_gradients([result], *exact_gradients(model))
    assert result["mesh"] == ("replicate", "shard")

def test_recomputing_activations_or_not_gives_the_same_gradients(good, one_rank, monkeypatch):
    monkeypatch.setattr(opsdc, "MAX_GAP", math.inf)
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(good["model"]))
    found = []
    for recompute in (True, False):
        cfg = opsdc.Config(**good, gradient_checkpointing=recompute)
        model, forwards = opsdc.load_model(cfg, torch.device("cpu")), []
        batches = opsdc.make_micro_batches(rollouts, problems, "cpu", cfg)
        teacher = opsdc.teacher_pass(model, other_weights(model.lm.named_parameters()), batches)
        model.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        objective = opsdc.student_pass(model, batches, *teacher, cfg)
        assert len(forwards) == len(batches) * (1 + recompute)
        found.append([torch.tensor(objective["loss"]), *(p.grad.full_tensor() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0] > 0

# ----------------------------------------------------------------------------------------- engine and trainer

def without_cpu_packing():
    """vLLM's layers as on a GPU, where a reload goes layer by layer into the tensors that are there; on CPUs
    it packs them afterwards."""
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    class NoCpu:
        platform = linear.current_platform
        is_cpu = staticmethod(lambda: False)

        def __getattr__(self, name):
            return getattr(self.platform, name)
    linear.current_platform = utils.current_platform = vocab_parallel_embedding.current_platform = NoCpu()

def sync_over_nan(engine, model, sync=opsdc.RolloutEngine.sync):
    """engine.sync into parameters that are not numbers (asleep they are nothing): all are written, none
    moves."""
    weights = lambda: dict(engine.llm.apply_model(lambda module: list(module.named_parameters()))[0])
    before = {name: p.data_ptr() for name, p in weights().items()}
    for p in weights().values() if not engine.sleeps else ():
        p.data.fill_(math.nan)
    sync(engine, model)
    assert len(before) > 5 and {name: p.data_ptr() for name, p in weights().items()} == before
    assert all(p.isfinite().all() for p in weights().values())

def sync(model_path, file, vllm_tp):
    """Worker: rollouts, their mean logprob, and the gap between engine and trainer after a sync, at a low
    temperature, after theta moved, after the next sync. Then how many tensors a sync gathers, how many
    there are, and the GiB of the GPU that the engine's sleep frees."""
    device = opsdc.start_processes()
    if device.type == "cpu":
        without_cpu_packing()
    cfg = opsdc.Config(model=model_path, batch_size=4, max_prompt_tokens=512, max_response_tokens=40,
                       vllm_tp=int(vllm_tp))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    problems, _ = fixed_batch(tokenizer)
    engine, model = opsdc.RolloutEngine(cfg), opsdc.load_model(cfg, device)
    thetabar = opsdc.snapshot(model)

    def step(synced, cfg=cfg):
        if synced:
            sync_over_nan(engine, model)
        rollouts = opsdc.sample_rollouts(engine, problems, [0, 1, 2, 4], 1, tokenizer, cfg)
        batches = opsdc.make_micro_batches(rollouts, problems, device, cfg)
        objective = opsdc.student_pass(model, batches, *opsdc.teacher_pass(model, thetabar, batches), cfg)
        model.zero_grad()
        return ([r.ids for r in rollouts], statistics.fmean(x for r in rollouts for x in r.logprobs),
                objective["logprob_gap_max"])

    found = [step(synced=True), step(synced=False, cfg=dataclasses.replace(cfg, temperature=0.05))]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    try:
        found.append(f"not stopped: {step(synced=False)}")
    except RuntimeError as error:
        found.append(str(error))
    opsdc.MAX_GAP, gather, gathered = math.inf, DTensor.full_tensor, []
    found += [step(synced=False), step(synced=True)]
    DTensor.full_tensor = lambda self: gathered.append(self) or gather(self)
    engine.sync(model)
    free = lambda: torch.cuda.mem_get_info()[0] / 2**30 if engine.sleeps else 0
    awake, _ = free(), engine.sleep()
    found.append([len(gathered), len(list(model.parameters())), free() - awake])
    if torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(found))

def test_weight_sync_is_seen_in_the_logprob_gap(family, random_model, tmp_path):
    """On one rank (Qwen3, tied), and on two that share an engine by tensor parallelism (Llama, untied), with
    vLLM's reload as on a GPU; the other runs here have the CPU's."""
    ranks = dict(qwen3=1, llama=2)[family]
    succeed("sync", random_model, tmp_path / "found.json", ranks, ranks=ranks, script="test_opsdc.py")
    found = json.loads((tmp_path / "found.json").read_text())
    (ids, warm, fresh), (_, cold, sharp), stopped, (*_, stale), (new_ids, _, again), counts = found
    assert fresh < 1e-4 and sharp < 1e-4 and again < 1e-4 and stale > 1e-2
    assert cold > warm + 1  # --temperature 0.05 draws what is likely; the logprobs stay the model's own
    assert "No update was made. Look, likeliest first" in stopped
    assert ids != new_ids  # the same seeds, other weights
    assert counts[0] == counts[1]  # gathered: each parameter once, a tied head too

def test_calls_of_the_engine_on_a_gpu(good, one_rank, monkeypatch):
    """A recording engine, where torch believes in a GPU: with which arguments it is made, in which order it
    sleeps, wakes, is loaded and asked. With load_format="auto" (eval.py) it never sleeps."""
    calls, made = [], []

    class Recorder:
        def __init__(self, *args, **settings):
            made.append(settings)
            self.llm_engine = self.engine_core = self._finalizer = self
            self.model_config = types.SimpleNamespace(dtype=settings["dtype"], try_get_generation_config=dict)
            self.get_tokenizer = lambda: AutoTokenizer.from_pretrained(args[0])
            self.apply_model = lambda asked: [True]  # it has a head

        def __getattr__(self, name):
            def call(*args, kwargs={}, **more):
                synced = dict(kwargs.get("weights_iterator", ()))
                assert all(w.dtype == torch.bfloat16 for w in synced.values())
                calls.append((name, *args, *more.values(), len(synced)) if name in named else name)
            return call
    named = "sleep", "wake_up", "collective_rpc"
    model = opsdc.load_model(opsdc.Config(model=good["model"]), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Recorder, SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.transformers.base",
                        types.SimpleNamespace(Base=types.SimpleNamespace()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for load_format in ("dummy", "auto"):
        engine = opsdc.RolloutEngine(opsdc.Config(**good, vllm_memory=0.7), load_format)
        for _ in range(2 if load_format == "dummy" else 0):
            engine.sync(model)
            engine.generate([], [], max_tokens=1)
            engine.sleep()
    asleep = "sleep", 2, 0
    step = (("wake_up", ["weights"], 0), ("collective_rpc", "reload_weights", len(model.lm.state_dict())),
            ("wake_up", ["kv_cache"], 0), "reset_prefix_cache", "enqueue", "has_unfinished_requests", asleep)
    assert calls == ["detach", asleep, *step, *step, "detach"]
    common = dict(distributed_executor_backend="external_launcher", tensor_parallel_size=1, max_model_len=536,
                  dtype=torch.bfloat16, enforce_eager=False, enable_chunked_prefill=True,
                  gpu_memory_utilization=0.7)
    for settings, load_format in zip(made, ("dummy", "auto"), strict=True):
        assert settings["hf_overrides"](AutoConfig.from_pretrained(good["model"])).head_dtype == "float32"
        assert settings == settings | common | dict(load_format=load_format,
                                                    enable_sleep_mode=load_format == "dummy")

# --------------------------------------------------------------------------------------------------- families
# `python test_opsdc.py families [NAME ...]`: a tiny random model of each family through opsdc.py's own
# command (3 updates, a refresh, rollouts past any sliding window) and what it exports through eval.py's
# engine and AutoModelForCausalLM. vLLM is imported once; a forked process a family. Norms, biases and sinks
# are noise, so that a forgotten one shows.

TIED = dict(tie_word_embeddings=True)
GDN = dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
           linear_num_value_heads=2, linear_key_head_dim=128, linear_value_head_dim=128)
MAMBA = dict(mamba_d_state=16, mamba_d_head=16, mamba_n_heads=8, mamba_n_groups=1, mamba_d_ssm=128,
             mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=32)
WINDOW = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
MOE = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
           moe_intermediate_size=64, norm_topk_prob=True, n_group=1, topk_group=1, n_shared_experts=1,
           first_k_dense_replace=1)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
ROPE = dict(rope_type="default", rope_theta=10000.0)
SLIDING_ROPE = dict(rope_parameters=dict(sliding_attention=ROPE, full_attention=ROPE))
FAMILIES = {  # name: model_type, what its config says beyond SHAPE
    "Qwen2": ("qwen2", {}), "Qwen3, tied": ("qwen3", TIED),
    "Qwen3, untied": ("qwen3", {}), "Qwen3, more vocabulary than tokens": ("qwen3", dict(vocab_size=512)),
    "Llama 3, rope scaling": ("llama", dict(rope_parameters=ROPE | dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=256))),
    "Qwen3, YaRN": ("qwen3", dict(rope_parameters=ROPE | dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=512))),
    "Mistral, window": ("mistral", dict(sliding_window=32)), "Ministral 3 text": ("ministral3", {}),
    "Ministral 3, queries scaled": ("ministral3", dict(rope_parameters=ROPE | dict(
        rope_type="yarn", factor=8.0, llama_4_scaling_beta=0.1, original_max_position_embeddings=32))),
    "Mamba 2": ("mamba2", dict(state_size=16, num_heads=8, n_groups=1, head_dim=16)),
    "InternVL": ("internvl", dict(text_config=dict(model_type="qwen2"), vision_config=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=[28, 28],
        patch_size=[14, 14]))),
    "Phi-3/4": ("phi3", {}), "Gemma 3 text": ("gemma3_text", WINDOW | TIED | dict(query_pre_attn_scalar=32)),
    "GLM4": ("glm4", {}), "Nemotron": ("nemotron", {}), "ERNIE 4.5": ("ernie4_5", {}),
    "EXAONE 4": ("exaone4", WINDOW), "StableLM": ("stablelm", {}),
    "OLMo 2": ("olmo2", {}), "OLMo 3": ("olmo3", WINDOW), "SmolLM3": ("smollm3", TIED),
    "Seed-OSS": ("seed_oss", {}), "Hunyuan dense": ("hunyuan_v1_dense", {}),
    "Ministral": ("ministral", WINDOW),
    "Qwen3.5": ("qwen3_5", dict(text_config=GDN, vision_config=QWEN_VISION)),
    "Qwen3.5 text": ("qwen3_5_text", GDN),
    "Qwen3-Next": ("qwen3_next", GDN | MOE), "Falcon-H1": ("falcon_h1", MAMBA | dict(lm_head_multiplier=0.5)),
    "Granite 4 hybrid": ("granitemoehybrid", MAMBA | dict(
        layer_types=["mamba", "attention"], logits_scaling=3.0, num_local_experts=0,
        shared_intermediate_size=128)),
    "Gemma 3": ("gemma3", dict(text_config=WINDOW | TIED | dict(query_pre_attn_scalar=32),
                               vision_config=VISION)),
    "Gemma 4 text": ("gemma4_text", WINDOW | TIED | dict(
        final_logit_softcapping=5.0, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
        global_head_dim=32)),
    "Gemma 2": ("gemma2", WINDOW | TIED | dict(final_logit_softcapping=5.0, attn_logit_softcapping=2.0,
                                        query_pre_attn_scalar=32)),
    "Granite": ("granite", TIED | dict(logits_scaling=4.0)),
    "MiniCPM3": ("minicpm3", dict(dim_model_base=16, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
                                  qk_rope_head_dim=16, v_head_dim=32, num_key_value_heads=2)),
    "Cohere 2": ("cohere2", WINDOW | TIED | dict(logit_scale=0.25, sliding_window=1024)),
    "Cohere 2, past the window": ("cohere2", WINDOW | TIED | dict(logit_scale=0.25)),
    "Qwen3-MoE": ("qwen3_moe", MOE), "Mixtral": ("mixtral", MOE), "GLM4-MoE": ("glm4_moe", MOE),
    "dropout in the config": ("qwen2", dict(attention_dropout=0.1)),
    "Ministral 3, nested": ("mistral3", dict(text_config=dict(model_type="ministral3"),
                                             vision_config=VISION)),
    "gpt-oss": ("gpt_oss", MOE | WINDOW), "NemotronH": ("nemotron_h", {}),
}
REFUSED = {"HyperCLOVA X": ("hyperclovax", dict(logits_scaling=0.5))}
REMARKS = {
    "Gemma 2": "attn_implementation=\"eager\" in transformers, whose sdpa leaves the attention's "
               "soft cap out",
    "Gemma 3": "multimodal: text only", "InternVL": "multimodal: text only",
    "Ministral 3, nested": "multimodal: text only",
    "Qwen3.5": "multimodal: text only; bfloat16 engine; torchvision stubbed",
    "Qwen3.5 text": "bfloat16 engine; torchvision stubbed", "Qwen3-Next": "bfloat16 engine",
    "gpt-oss": "not served: vLLM's reload leaves its experts as they were (sinks are right)",
    "NemotronH": "not served: vLLM's experts without a gate need a GPU",
    "Cohere 2, past the window": "vLLM adds one to the window, which the engine's config takes off",
}
SHAPE = dict(vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=2048,
             tie_word_embeddings=False)

def make_family(directory, name):
    """A random model of FAMILIES with a tokenizer."""
    torch.manual_seed(0)
    kind, changes = (FAMILIES | REFUSED)[name]
    tokenizer = make_tokenizer(tuple(opsdc.INSTRUCTIONS.values()), QWEN_TEMPLATE)
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                   bos_token_id=None)
    if "text_config" in changes:
        text = SHAPE | special | changes["text_config"]
        config = AutoConfig.for_model(kind, **special, **changes | dict(
            text_config=text, tie_word_embeddings=text["tie_word_embeddings"]))
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | special | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

def stub_torchvision(directory):
    """The CPU set-up has no torchvision, which vLLM's Qwen3.5 imports for images: an empty one."""
    package = directory / "stub/torchvision"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(
        "import sys, types\nfrom importlib.machinery import ModuleSpec\n__version__ = '0'\n"
        "class Name(type):\n    def __getattr__(self, name):\n"
        "        if name.startswith('__'): raise AttributeError(name)\n        return name\n"
        "class Stub(types.ModuleType):\n    __path__ = []\n"
        "    def __getattr__(self, name):\n        if name.startswith('__'): raise AttributeError(name)\n"
        "        return Name(name, (), {})\n"
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        return ModuleSpec(name, self, is_package=True) "
        "if name.startswith('torchvision.') else None\n"
        "    def create_module(self, spec): return Stub(spec.name)\n    def exec_module(self, module): pass\n"
        "sys.meta_path.append(Finder())\n")
    os.environ["PYTHONPATH"] = f"{package.parent}:{HERE}"
    sys.path.insert(0, str(package.parent))

def forget_kernels(engine):
    """The repair of vLLM's reload on CPU: without a kernel it packs the experts anew."""
    for module in engine.modules():
        if hasattr(getattr(module, "quant_method", None), "moe_kernel"):
            module.quant_method.moe_kernel = None

def family_run(directory, name, repaired):
    """opsdc.py's command on directory/model, once more with vLLM's experts repaired."""
    if repaired:
        sync = opsdc.RolloutEngine.sync
        opsdc.RolloutEngine.sync = lambda self, model: (self.llm.apply_model(forget_kernels),
                                                        sync(self, model))
    if name == "Gemma 3":  # whose weights have other names in a checkpoint
        without_cpu_packing()
        opsdc.RolloutEngine.sync = sync_over_nan
    if "Qwen3.5" in name:
        stub_torchvision(directory)
    shutil.rmtree(directory / "out", ignore_errors=True)
    sys.argv = ["opsdc.py", *map(str, small_run(
        directory / "model", write_rows(directory / "rows.jsonl"), directory / "out", steps=3, batch_size=4,
        max_response_tokens=40))]
    opsdc.main()

def family_export(directory, name):
    """Mean difference of log-probabilities between eval.py's engine and transformers on the export."""
    if "Qwen3.5" in name:
        stub_torchvision(directory)
    folder = str(directory / "out/model")
    opsdc.start_processes()
    tokenizer, _ = opsdc.load_tokenizer(folder)
    engine = opsdc.RolloutEngine(opsdc.Config(model=folder, max_prompt_tokens=512, max_response_tokens=40),
                                 load_format="auto")
    prompts = [opsdc.student_prompt(tokenizer, f"What is {i} + {i}?") for i in range(4)]
    samples = engine.generate(prompts, list(range(4)), max_tokens=40, temperature=1.0)
    capped = "attn_logit_softcapping" in FAMILIES[name][1]  # which transformers' sdpa leaves out
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager" if capped else None)
    gaps = []
    for prompt, (ids, logprobs, _) in zip(prompts, samples):
        with torch.no_grad():
            own = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        gaps += (own.gather(-1, torch.tensor(ids)[:, None])[:, 0] - torch.tensor(logprobs)).abs().tolist()
    (directory / "export").write_text(str(statistics.fmean(gaps)))

def forked(function, log, *arguments):
    """function(*arguments) in a forked process whose output goes to `log`; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        function(*arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

def family_gap(directory):
    """The largest gap of a step of the run, or None before it ended."""
    file = directory / "out/metrics.jsonl"
    gaps = [line["logprob_gap"] for line in metrics_of(directory / "out")] if file.exists() else []
    return max(gaps) if len(gaps) == 3 else None

def family_row(directory, name):
    """A dict of the table: family, gap, export, remark, seconds."""
    directory = Path(directory) / re.sub(r"\W+", "-", name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    log, start, remark = directory / "log", time.perf_counter(), REMARKS.get(name, "")
    make_family(directory / "model", name)
    failed = lambda: [line for line in log.read_text().splitlines()
                      if "Error: " in line or "error: " in line][-1]
    if forked(family_run, log, directory, name, False):
        stopped = re.search("differ by ([0-9.]+) nats", failed())
        remark = f"{remark}; {failed()[:100]}" if not stopped else f"stops at a gap of {stopped[1]}; {remark}"
        if stopped and name != "gpt-oss" and "experts" in str(FAMILIES[name]):
            forked(family_run, log, directory, name, True)
            remark += ("; " * remark.endswith("engine") + "vLLM's CPU packs experts at the first load only; "
                       "gap and export are with that repaired")
    gap = family_gap(directory)
    if gap is not None and forked(family_export, log, directory, name):
        remark = "export: " + failed()[:150]
    export = float((directory / "export").read_text()) if (directory / "export").exists() else None
    return dict(family=name, gap=gap, export=export, remark=remark,
                seconds=round(time.perf_counter() - start))

def families(*names, directory="out-families"):
    """The table of the README; in the order of FAMILIES, two at a time."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
                      VLLM_CPU_KVCACHE_SPACE="1", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")
    import vllm.entrypoints.llm  # noqa: F401  once, for all children
    with ThreadPoolExecutor(2) as pool:
        rows, found = [], []
        for row in pool.map(lambda name: family_row(directory, name), names or FAMILIES):
            found.append(row)
            rows.append([f"{x:.0e}" if isinstance(x, float) else "" if x is None else x
                         for x in row.values()])
            print(*rows[-1], sep=" | ", flush=True)
    print(ev.markdown(["family", "gap", "export", "remark", "s"], rows))
    (Path(directory) / "table.json").write_text(json.dumps(found))

def test_eight_families_that_differ_most_in_code(tmp_path):
    """A transformers backend, a nested config, a hybrid, scaled logits, both soft caps, a buffer in the state
    dict, fused and renamed experts, a kernel for bfloat16 only."""
    names = ["SmolLM3", "Gemma 3", "Falcon-H1", "Granite", "Gemma 2", "Gemma 4 text", "Mixtral", "Qwen3-Next"]
    code = f"import test_opsdc; test_opsdc.families(*{names}, directory={str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=300)
    for row in json.loads((tmp_path / "table.json").read_text()):
        bound = 2e-2 if row["family"] == "Qwen3-Next" else 1e-4
        assert row["gap"] and row["gap"] < bound and row["export"] is not None and row["export"] < bound, row

def test_logits_that_the_loss_does_not_compute_stop_with_one_line(one_rank, tmp_path, capsys):
    """HyperCLOVA X multiplies by the logits_scaling by which Granite divides."""
    make_family(tmp_path, "HyperCLOVA X")
    with pytest.raises(SystemExit) as exit:
        opsdc.load_model(opsdc.Config(model=str(tmp_path)), torch.device("cpu"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 1 and len(lines) == 1
    assert re.search("expected the loss to compute the model's own log-probabilities, found [0-9.]+ nats",
                     lines[0])

def test_weights_are_neither_made_up_nor_tied_against_their_files(one_rank, tmp_path, capsys):
    def said():
        with pytest.raises(SystemExit):
            opsdc.load_model(opsdc.Config(model=str(tmp_path)), torch.device("cpu"))
        return capsys.readouterr().out
    make_family(tmp_path, "Qwen2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(tie_word_embeddings=True)))
    assert re.search("error: --model .* expected embedding and head to be one, .* found two tensors", said())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "q_proj" not in name},
              tmp_path / "model.safetensors", metadata=dict(format="pt"))
    assert re.search("error: --model .* expected weights .*q_proj.* found none in its files", said())

def test_dropout_in_the_config_changes_nothing(one_rank, tmp_path):
    found, device = [], torch.device("cpu")
    for name in ("Qwen2", "dropout in the config"):
        make_family(tmp_path / name, name)
        cfg = opsdc.Config(model=str(tmp_path / name))
        problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(cfg.model))
        model = opsdc.load_model(cfg, device)
        batches = opsdc.make_micro_batches(rollouts, problems, device, cfg)
        hidden, head = opsdc.teacher_pass(model, other_weights(model.lm.named_parameters()), batches)
        batch, = batches
        loss, _ = model(*batch.student, hidden[0], head, batch.weights)
        loss.backward()
        layers = model.lm.get_decoder().layers
        assert all(layer.training and layer.gradient_checkpointing for layer in layers)
        assert model.lm.config.attention_dropout == (0.1 if name != "Qwen2" else 0.0)
        found.append([loss.item(), *(p.grad.full_tensor() for p in model.parameters())])
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1:], found[1][1:]))

# ------------------------------------------------------------------------------------------------- whole runs

def write_rows(path, n=40):
    path.write_text("".join(json.dumps(dict(problem=f"What is {i} + {i}?", answer=str(2 * i))) + "\n"
                            for i in range(n)))
    return path

def small_run(model, data, out, **options):
    settings = dict(model=model, data=data, out=out, steps=6, batch_size=6, lr=1e-3, refresh_every=2,
                    save_every=2, max_prompt_tokens=512, max_response_tokens=24) | options
    return [word for name, value in settings.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", value])]

def same_metrics(a, b):
    """All that is not a measurement of time or memory."""
    names = [key for key in a
             if not key.startswith("seconds") and key not in ("tokens_per_second", "peak_memory_gib")]
    return {key: a[key] for key in names} == {key: b.get(key) for key in names}

def start_and_signal(arguments, log, lines, number):
    """Start opsdc.py on one rank, send it a signal once `log` has so many lines; returns the exit status."""
    command = [sys.executable, HERE / "opsdc.py", *arguments]
    with subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        deadline = time.time() + 120
        while not (log.exists() and len(log.read_text().splitlines()) >= lines) and time.time() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
    return process.returncode

@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Six steps on one rank, never interrupted, with a refresh after every second one."""
    directory = tmp_path_factory.mktemp("runs")
    model, data = make_model(directory / "m", "qwen3"), write_rows(directory / "rows.jsonl")
    succeed(*small_run(model, data, directory / "whole"))
    return model, data, directory / "whole"

def test_killed_and_resumed_run_equals_an_uninterrupted_one(whole_run, tmp_path):
    model, data, whole = whole_run
    log = tmp_path / "out/metrics.jsonl"
    start_and_signal(small_run(model, data, tmp_path / "out"), log, 3, signal.SIGKILL)
    assert 3 <= len(metrics_of(tmp_path / "out")) < 6
    with open(log, "a") as file:
        file.write('{"step": 4, "lo')  # what a kill in the middle of a line leaves
    arguments = small_run(model, data, tmp_path / "out", resume=True)
    done, seconds = seconds_to_leave("export", tmp_path, arguments)
    assert done.returncode == 0 and seconds < 20, done.stdout[-5000:]  # nor does a normal end wait
    assert all(same_metrics(a, b) for a, b in zip(metrics_of(whole), metrics_of(tmp_path / "out"),
                                                  strict=True))
    assert [line["teacher_age"] for line in metrics_of(whole)] == [0, 1, 0, 1, 0, 1]
    assert sorted(p.name for p in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
    a, b = (AutoModelForCausalLM.from_pretrained(x / "model").state_dict() for x in (whole, tmp_path / "out"))
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == torch.bfloat16 for name in a)

def test_sigterm_saves_and_exits_with_0_and_no_rollout_kept_means_no_update(whole_run, tmp_path):
    """--keep correct of a random model, which is never right: steps without an update, ended by SIGTERM."""
    model, data, whole = whole_run
    arguments = small_run(model, data, tmp_path / "out", steps=500, save_every=1000, keep="correct")
    assert start_and_signal(arguments, tmp_path / "out/metrics.jsonl", 2, signal.SIGTERM) == 0
    lines = metrics_of(tmp_path / "out")
    assert 2 <= len(lines) < 500 and (tmp_path / f"out/checkpoint-{len(lines)}/state.json").exists()
    assert lines[0]["response_tokens"] == metrics_of(whole)[0]["response_tokens"]
    for line in lines:
        assert line["accuracy"] == line["skipped_updates"] == 0 and not {"loss", "grad_norm"} & set(line)

def test_conversations_as_they_are_that_are_never_right_then_more_steps_than_asked_for(whole_run, tmp_path):
    """With --wrapper none; ten steps without a rollout to keep are enough. Then a run that went further."""
    model, _, whole = whole_run
    data = as_file(tmp_path, "chats.json.gz", json.dumps([
        dict(prompt=turns("system", "user", "assistant", "user"), answer=str(i)) | dict(question=str(i))
        for i in range(3)] + [
        dict(prompt=[dict(role="user", content=f"Say {i}.")], answer=i) for i in range(9)]))
    done = run(*small_run(model, data, tmp_path / "out", steps=50, batch_size=2, keep="correct",
                          wrapper="none"))
    assert done.returncode == 1 and "no rollout was kept in ten steps" in done.stdout, done.stdout[-3000:]
    assert "warning: no rollout was kept in three steps" in done.stdout
    assert "a response ends with the id 1 <|im_end|>\n" in done.stdout
    lines, samples = metrics_of(tmp_path / "out"), (tmp_path / "out/samples.jsonl").read_text()
    assert len(lines) == 10 and not any("loss" in line for line in lines)
    assert '"problem": "Say ' in samples and '"problem": [{"role": "system", "content": "text 0"}' in samples
    shutil.copytree(whole, tmp_path / "whole")
    said = succeed(*small_run(model, whole_run[1], tmp_path / "whole", steps=4, resume=True))
    assert "6 steps are done, from" in said and "; --steps 4 adds none, model/ is that of step 6" in said
    assert "model is that of step 6; " in said and len(metrics_of(tmp_path / "whole")) == 6

def test_weights_that_are_not_finite_stop_before_the_first_step(whole_run, tmp_path):
    file = Path(shutil.copytree(whole_run[0], tmp_path / "m")) / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(weights, file, metadata=dict(format="pt"))
    done = run(*small_run(tmp_path / "m", whole_run[1], tmp_path / "out"))
    assert (done.returncode == 1
            and done.stdout.count("m: expected finite weights, found NaN or infinity") == 1)
    assert not (tmp_path / "out/metrics.jsonl").exists()

def die(moment, *arguments):
    """Worker: opsdc.py whose last rank is killed when it comes to `moment` of the third step."""
    owners = dict(sync=opsdc.RolloutEngine, fsync=os, grade_rollouts=ev)
    owner, name = owners.get(moment, opsdc), moment
    whole, sync, syncs = getattr(owner, name), opsdc.RolloutEngine.sync, []

    def wrapper(*args, **kwargs):
        if len(syncs) == 3 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    def counted(engine, model):
        syncs.append(model)
        (wrapper if moment == "sync" else sync)(engine, model)
    setattr(owner, name, wrapper)
    opsdc.RolloutEngine.sync, sys.argv = counted, ["opsdc.py", *arguments]
    opsdc.run_and_exit(opsdc.main)

def leave(when, file, *arguments):
    """Worker: opsdc.py whose process groups take minutes to destroy, as NCCL's do where a rank has failed.
    The time is written to `file` in function `when`, in which, but for the export, the last rank fails."""
    whole, torch.distributed.destroy_process_group = getattr(opsdc, when), lambda *_: time.sleep(60)

    def wrapper(*args):
        Path(file).write_text(str(time.time()))
        if when != "export" and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            raise RuntimeError("this rank fails")
        return whole(*args)
    setattr(opsdc, when, wrapper)
    sys.argv = ["opsdc.py", *arguments]
    opsdc.run_and_exit(opsdc.main)

def seconds_to_leave(when, directory, arguments, ranks=0):
    """(finished process, seconds from `when` to its end) of the worker above."""
    file = directory / "left"
    done = run("leave", when, file, *arguments, ranks=ranks, script="test_opsdc.py", timeout=400)
    return done, time.time() - float(file.read_text()) if file.exists() else math.nan

def test_a_failing_rank_ends_all_at_once(whole_run, tmp_path):
    model, data, _ = whole_run
    arguments = small_run(model, data, tmp_path / "out", steps=1)
    done, seconds = seconds_to_leave("teacher_pass", tmp_path, arguments, ranks=2)
    print(f"{seconds:.1f} s")
    assert done.returncode != 0 and "RuntimeError: this rank fails" in done.stdout, done.stdout[-5000:]
    assert seconds < 20

MOMENTS = ("sync", "sample_rollouts", "grade_rollouts", "teacher_pass", "student_pass", "update", "log_step",
           "fsync")  # fsync: its shard is written, the checkpoint is not whole yet

def drill(directory="out-drill"):
    """For every moment: of two ranks one dies; seconds until both are gone, what is left, the run resumed on
    one, two or three ranks."""
    directory = Path(directory)
    directory.mkdir()
    model, data = make_model(directory / "m", "qwen3"), write_rows(directory / "rows.jsonl")
    succeed(*small_run(model, data, directory / "whole"))
    print("| killed in | all gone after, s | left | resumed |\n|---|---|---|---|")
    for ranks, moment in zip(itertools.cycle((1, 2, 3)), MOMENTS):
        out = directory / moment
        arguments = small_run(model, data, out, save_every=1)
        _, seconds = killed_at(moment, arguments)
        left = ", ".join(sorted(path.name for path in out.glob("*checkpoint-*")))
        succeed(*arguments, "--resume", ranks=ranks)
        same_losses(directory / "whole", out)
        print(f"| {moment} | {seconds:.0f} | {left} | on {ranks}: equal |", flush=True)

def killed_at(moment, arguments, ranks=2):
    """(output, seconds from the death of the last rank to the end of the launcher)."""
    log = Path(arguments[arguments.index("--out") + 1]).with_suffix(".log")
    with open(log, "w") as file:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
             str(HERE / "test_opsdc.py"), "die", moment, *map(str, arguments)],
            env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True)
        children = lambda: subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True,
                                          text=True).stdout.split()
        while launcher.poll() is None and len(children()) < ranks:
            time.sleep(0.1)
        while launcher.poll() is None and len(children()) == ranks:
            time.sleep(0.1)
        start = time.time()
        assert launcher.wait(timeout=120) != 0
    return log.read_text(), time.time() - start

def same_losses(whole, out, steps=6):
    """The run in `out`, on whatever ranks it was resumed, is `whole`'s to 1e-5."""
    for a, b in zip(metrics_of(whole)[:steps], metrics_of(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["response_tokens"] == b["response_tokens"]

def test_rank_killed_while_saving_then_a_damaged_checkpoint_and_a_full_disk(whole_run, tmp_path):
    """Of two ranks one dies when its shard of checkpoint-3 is written, and checkpoint-2 loses a byte: one
    rank goes on from checkpoint-1, until the system refuses to write checkpoint-3 (64 KiB a file)."""
    model, data, whole = whole_run
    out = tmp_path / "out"
    log, seconds = killed_at("fsync", small_run(model, data, out, save_every=1))
    assert seconds < 60 and "Signal 9 (SIGKILL)" in log
    left = sorted(path.name for path in out.glob("*checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-2", "tmp-checkpoint-3"]
    (out / "checkpoint-best").mkdir()  # a user's own: neither resumed from nor removed
    shard = next((out / "checkpoint-2").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    command = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", sys.executable, HERE / "opsdc.py",
               *small_run(model, data, out, save_every=3, resume=True)]
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, text=True, timeout=200,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert f"checkpoint-2, which is not whole: {shard.name}" in done.stdout
    assert "1 steps are done, from" in done.stdout
    assert done.returncode == 1 and re.search("error: .*checkpoint-3 could not be written, with .* GiB free "
                                              "there; .*--resume goes on", done.stdout), done.stdout[-3000:]
    left = sorted(path.name for path in out.glob("checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-2", "checkpoint-best"]
    same_losses(whole, out, 3)

def nan(*arguments):
    """Worker: opsdc.py whose gradients are not a number from the second step on."""
    finite = opsdc.update

    def update(model, optimizer, cfg):
        if optimizer.state:  # a first step was made
            next(model.parameters()).grad.fill_(math.nan)
        return finite(model, optimizer, cfg)
    opsdc.update, sys.argv = update, ["opsdc.py", *arguments]
    opsdc.run_and_exit(opsdc.main)

def test_rollouts_of_one_token_and_three_bad_gradients_in_a_row(whole_run, tmp_path):
    """Responses that are nothing but the end of the turn are trained on; then the gradients go bad."""
    model, data, _ = whole_run
    shutil.copytree(model, tmp_path / "m")
    GenerationConfig(eos_token_id=list(range(400))).save_pretrained(tmp_path / "m")  # every token ends it
    done = run("nan", *small_run(tmp_path / "m", data, tmp_path / "out"), script="test_opsdc.py")
    assert done.returncode == 1
    assert "RuntimeError: three gradients in a row were not finite" in done.stdout.splitlines()[-1]
    lines = metrics_of(tmp_path / "out")
    assert all(line["response_tokens_max"] == 1 and line["truncated"] == 0 for line in lines)
    assert lines[0]["loss"] > 0 and lines[0]["grad_norm"] > 0 and lines[0]["logprob_gap_max"] < 1e-4
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2, 3] and lines[1]["grad_norm"] is None
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-2"]

def test_update_clips_the_gradient_and_drops_one_that_is_not_finite(good, one_rank):
    model = opsdc.load_model(opsdc.Config(model=good["model"]), torch.device("cpu"))
    before, sgd = opsdc.snapshot(model), torch.optim.SGD(model.parameters(), lr=1.0)
    moved = lambda: torch.cat([(p - before[name]).full_tensor().flatten()
                               for name, p in model.lm.named_parameters()]).norm().item()
    for grad, norm, step in ((2.0, 2.0, 0.5), (math.nan, math.nan, 0.5), (0.0, 0.0, 0.5)):
        for p in model.parameters():
            p.grad = torch.full_like(p, grad / math.sqrt(sum(q.numel() for q in model.parameters())))
        assert opsdc.update(model, sgd, opsdc.Config(clip=0.5)) == pytest.approx(norm, rel=1e-4, nan_ok=True)
        assert moved() == pytest.approx(step, rel=1e-3) and next(model.parameters()).grad is None

def test_a_checkpoint_before_the_first_update_does_not_count_as_one(good, one_rank):
    model = opsdc.load_model(opsdc.Config(model=good["model"]), torch.device("cpu"))
    adam = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    opsdc.training_state(model, adam, opsdc.snapshot(model))
    before = opsdc.snapshot(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opsdc.update(model, adam, opsdc.Config(clip=0.0))
    for name, p in model.lm.named_parameters():  # Adam's first step is the learning rate
        assert torch.allclose(before[name].full_tensor() - p.full_tensor(), torch.tensor(1.0), rtol=1e-4)

def test_keep_correct_drops_wrong_rollouts():
    rollouts = [opsdc.Rollout(i, [5], [-1.0], True, correct) for i, correct in enumerate((True, False, None))]
    assert opsdc.keep_rollouts(rollouts, opsdc.Config(keep="correct")) == rollouts[:1]
    assert opsdc.keep_rollouts(rollouts, opsdc.Config()) == rollouts

@pytest.mark.skipif(not MATH500.exists(), reason="needs MATH-500 as a file")
def test_real_problems(tmp_path):
    """The loop on MATH-500 with a random Qwen3 and a byte-level BPE tokenizer trained on the problems: LaTeX,
    long prompts, all rollouts cut. A decay of 1 / lr leaves nothing of the weights but Adam's last step."""
    texts = [json.loads(line)["problem"] for line in MATH500.read_text().splitlines()]
    model = make_model(tmp_path / "m", "qwen3", texts, vocabulary=2000)
    output = succeed(*small_run(model, MATH500, tmp_path / "out", steps=2, max_prompt_tokens=400,
                                max_response_tokens=8, instruction="v2", divergence="jsd",
                                weight_decay=1000))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert all(w.abs().max() < 0.01 for w in trained.parameters())
    dropped = int(re.search(r"(\d+) dropped \(a prompt longer than 400", output)[1])
    assert 0 < dropped < 250 and "500 left" not in output
    assert output.count("warning: all rollouts were cut at 8 tokens: do the model's turns end with "
                        "1 <|im_end|>?") == 1
    for line in metrics_of(tmp_path / "out"):
        assert line["loss"] > 0 and line["logprob_gap_max"] < 1e-4 and line["accuracy"] == 0
        assert line["truncated"] == 1

# -------------------------------------------------------------------------------------------------- bad input

@pytest.fixture
def one_rank():
    opsdc.start_processes()
    yield
    torch.distributed.destroy_process_group()

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model and a data file with which every check passes."""
    directory = tmp_path_factory.mktemp("good")
    return dict(model=str(make_model(directory / "m", "qwen3")),
                data=str(write_rows(directory / "rows.jsonl")), max_prompt_tokens=512, max_response_tokens=24)

def broken_data(directory, text):
    (directory / "rows.jsonl").write_text(text)
    return dict(data=str(directory / "rows.jsonl"))

def no_template(directory, good):
    tokenizer = AutoTokenizer.from_pretrained(good["model"])
    tokenizer.chat_template = None
    AutoConfig.from_pretrained(good["model"]).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return dict(model=str(directory))

def text_file(directory, content):
    (directory / "c.txt").write_bytes(content)
    return dict(instruction=f"@{directory / 'c.txt'}")

def bad_template(directory, good, template="{{ raise_exception('the system only') }}"):
    shutil.copytree(good["model"], directory / "m")
    (directory / "m/chat_template.jinja").write_text(template)
    return dict(model=directory / "m")

def others(directory, name, content):
    """--out, where somebody else's things are."""
    (directory / "theirs/model").mkdir(parents=True)
    (directory / "theirs" / name).write_text(content)
    return dict(out=directory / "theirs")

RANGES = {  # option of opsdc.py: values, and the words of the range
    "steps": ("0 -1", "at least 1"), "batch_size": ("0 -32", "at least 1"),
    "lr": ("-0.1 nan inf 2", "at least 0 and at most 1"),
    "weight_decay": ("-0.1 nan inf", "at least 0"), "clip": ("-1 nan inf", "at least 0"),
    "temperature": ("-1 nan 2.1 inf", "at least 0 and at most 2"), "max_prompt_tokens": ("0", "at least 1"),
    "max_response_tokens": ("0 -5", "at least 1"), "refresh_every": ("-1", "at least 0"),
    "micro_batch_tokens": ("0", "at least 1"), "loss_chunk": ("0 -1", "at least 1"),
    "vllm_tp": ("0", "at least 1"),
    "vllm_memory": ("0 1.1 -0.5 nan", "at least 0.01 and at most 1"), "eval_every": ("-1", "at least 0"),
    "eval_samples": ("0", "at least 1"), "save_every": ("0 -1", "at least 1"),
    "seed": ("-1 4294967296", "at least 0 and at most 4294967295"),
}
BAD_INPUT = {
    "model": (lambda d, good: dict(model=d / "nowhere"),
              "--model .*nowhere: expected a folder with a chat model, or the id .* found no such"),
    "template": (no_template, "no chat template"),
    "template that raises": (bad_template, "chat template fails on .*What is 0.*: the system only"),
    "no data": (lambda d, good: dict(data=d / "no.jsonl"), "no.jsonl: .* No such file"),
    "empty data": (lambda d, good: broken_data(d, ""), "expected problems, found 0,"),
    "blank lines": (lambda d, good: broken_data(d, "\n \n"), "expected problems, found 0,"),
    "malformed line": (lambda d, good: broken_data(d, '{"problem": "x"}\n\n{"problem"\n'),
                       "line 3, expected a JSON object, found"),
    "no problem field": (lambda d, good: broken_data(d, '{"text": "x"}\n'),
                         "line 1: expected a field problem, prompt or question, found text"),
    "conversation": (lambda d, good: broken_data(d, json.dumps(dict(
                         prompt=turns("user", "assistant", "user")))),
                     "line 1, field prompt: .*--wrapper none"),
    "long prompts": (lambda d, good: dict(max_prompt_tokens=5), "none with prompts of at most 5 tokens"),
    "context": (lambda d, good: dict(max_response_tokens=4000),
                "= 4512 is more than the model's context of 2048"),
    "tp": (lambda d, good: dict(vllm_tp=2),
           "--vllm_tp 2: expected a number of ranks that it divides, found 1"),
    "no answers": (lambda d, good: broken_data(d, '{"problem": "x"}\n') | dict(keep="correct"),
                   "--keep correct: 1 of the 1 problems"),
    "blank answers": (lambda d, good: (broken_data(d, '{"problem": "x", "answer": " "}\n')
                                       | dict(keep="correct")),
                      "--keep correct: 1 of the 1 problems"),
    "instruction": (lambda d, good: dict(instruction="@nowhere.txt"),
                    "--instruction @nowhere.txt.* No such file"),
    "one word": (lambda d, good: dict(instruction="V3"),
                 "--instruction V3: expected v1, v2, 20%, 50%, 80%, @FILE"),
    "no text": (lambda d, good: text_file(d, b" \n"), "--instruction @.*c.txt: expected v1, .* found ''"),
    "latin-1": (lambda d, good: text_file(d, "sois pr\u00e9cis".encode("latin-1")),
                "--instruction @.* encoding UTF-8"),
    "another's model": (lambda d, good: others(d, "note", ""),
                        "--out .*theirs holds a run .or a model. already"),
    "out is a file": (lambda d, good: dict(out=good["data"]),
                      "--out .*rows.jsonl, expected a folder to write to"),
    "out below a file": (lambda d, good: dict(out=good["data"] + "/x"),
                         "--out .*rows.jsonl/x, expected a folder"),
    "no number": (lambda d, good: dict(steps="many"), "--steps: invalid int value: 'many'"),
    "no choice": (lambda d, good: dict(divergence="KL"), "--divergence: invalid choice: 'KL'.*reverse_kl"),
    "no option": (lambda d, good: dict(batch_sise=8), "expected options as in --help, found --batch_sise 8"),
    "stray word": (lambda d, good: dict(seed="1 2".split()), "expected options as in --help, found 2"),
} | {f"{name} {value}": (lambda d, good, change={name: value}: change,
                         f"--{name} {value}.*: expected {words}")
     for name, (values, words) in RANGES.items() for value in values.split()}

@pytest.fixture
def no_group():
    """For a command of ours in this process, which joins a group and then refuses."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

def refusal(command, capsys):
    """The one line with which `command` ends, with status 1."""
    with pytest.raises(SystemExit) as exit:
        command()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 1 and len(lines) == 1, lines
    return lines[0]

def folder(make, **config):
    """Of the good model a copy with another config, then changed by `make`(directory)."""
    def change(directory, good):
        target = directory / "model"
        shutil.copytree(good["model"], target)
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        make(target)
        return dict(model=str(target))
    return change

def as_adapter(target):
    (target / "config.json").unlink()
    (target / "model.safetensors").rename(target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text('{"peft_type": "LORA"}')

def touch(name):
    return lambda target: (target / name).write_text("{}")

def as_is(target):
    pass

def of_type(model_type, architecture, **config):
    return folder(as_is, model_type=model_type, architectures=[architecture], **config)

REMOTE = dict(AutoConfig="code.OddConfig", AutoModelForCausalLM="code.OddForCausalLM")
PHI3_ROPE = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 16, long_factor=[2.0] * 16,
                 original_max_position_embeddings=512)
CAUSAL = "model: expected a causal language model in plain weights, found "
FOLDERS = {
    "encoder": (of_type("bert", "BertModel"), f"{CAUSAL}.*BertModel of type bert; take a ...ForCausalLM"),
    "encoder with a head": (of_type("bert", "BertLMHeadModel"), f"{CAUSAL}.*BertLMHeadModel"),
    "encoder-decoder": (of_type("t5", "T5ForConditionalGeneration", is_encoder_decoder=True),
                        f"{CAUSAL}.*T5ForConditionalGeneration"),
    "reward": (folder(as_is, architectures=["Qwen3ForSequenceClassification"]),
               f"{CAUSAL}.*Qwen3ForSequenceClassification"),
    "base model": (folder(as_is, architectures=["Qwen3Model"]), f"{CAUSAL}.*Qwen3Model"),
    "embedding": (folder(touch("modules.json")), f"{CAUSAL}.*an embedding model"),
    **{name: (folder(as_is, quantization_config=dict(quant_method=name, bits=4, load_in_4bit=True)),
              f"{CAUSAL}.*quantised weights; take") for name in ("fp8", "gptq", "awq", "bitsandbytes")},
    "quantised text of a multimodal model": (
        of_type("internvl", "InternVLForConditionalGeneration", text_config=dict(
            model_type="qwen2", quantization_config=dict(quant_method="compressed-tensors"))),
        f"{CAUSAL}.*quantised weights; take"),
    "prefix attention": (of_type("gemma", "GemmaForCausalLM", use_bidirectional_attention=True),
                         f"{CAUSAL}.*two-way attention"),
    "images that need timm": (of_type("gemma3n", "Gemma3nForConditionalGeneration"),
                              "expected a class that transformers can make: .*timm"),
    "adapter": (folder(as_adapter), "model: expected a folder .* found a LoRA adapter; merge"),
    "multimodal, no causal text": (of_type("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration",
                                           vision_config={}),
                                   f"{CAUSAL}.*Qwen2_5_VLForConditionalGeneration of type qwen2_5_vl_text"),
    "longrope": (of_type("phi3", "Phi3ForCausalLM", rope_parameters=PHI3_ROPE,
                         original_max_position_embeddings=512),
                 f"{CAUSAL}.*LongRoPE and 536 tokens.* at 512; lower"),
    "no weights": (folder(lambda target: (target / "model.safetensors").unlink()),
                   "model: expected a folder .* found no weights, .safetensors or .bin"),
    "head bias": (of_type("phi", "PhiForCausalLM", partial_rotary_factor=0.5),
                  "expected .layers and a head without a bias, found PhiForCausalLM"),
    "other layers": (of_type("gpt2", "GPT2LMHeadModel"), f"{CAUSAL}.*GPT2LMHeadModel"),
    "remote code": (folder(touch("code.py"), model_type="odd", architectures=["OddForCausalLM"],
                           auto_map=REMOTE), "model: expected a folder .* contains custom code"),
    "unknown type": (of_type("odd", "OddForCausalLM"), "model: expected a folder .* model type `odd`"),
}

@pytest.mark.parametrize("case", FOLDERS)
def test_models_that_cannot_be_trained_are_refused_in_two_seconds(case, good, one_rank, tmp_path, capsys,
                                                                 monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    change, message = FOLDERS[case]
    settings = dict(good) | dict(out=str(tmp_path / "out")) | change(tmp_path, good)
    start = time.perf_counter()
    with pytest.raises(SystemExit) as exit:
        opsdc.prepare(opsdc.Config(**settings))
    seconds = time.perf_counter() - start
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 1 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert seconds < 2 and not (tmp_path / "out").exists()

def test_a_multimodal_model_says_that_text_alone_is_trained(good, one_rank, tmp_path, capsys):
    make_family(tmp_path / "model", "Gemma 3")
    opsdc.prepare(opsdc.Config(**dict(good) | dict(out=str(tmp_path / "out"), model=str(tmp_path / "model"))))
    assert "is multimodal: its text model alone is trained, and exported as a Gemma3ForCausalLM" in (
        capsys.readouterr().out)

@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_stops_with_a_clear_message(case, good, no_group, tmp_path, capsys, monkeypatch):
    change, message = BAD_INPUT[case]
    settings = dict(good) | dict(out=tmp_path / "out") | change(tmp_path, good)
    words = [word for name, value in settings.items()
             for word in (f"--{name}", *(value if isinstance(value, list) else [value]))]
    monkeypatch.setattr(sys, "argv", ["opsdc.py", *map(str, words)])
    assert re.search(message, refusal(opsdc.main, capsys))
    assert not (tmp_path / "out").exists()

def test_every_number_has_a_range():
    parser = opsdc.HfArgumentParser(opsdc.Config)
    numbers = [f.name for f in dataclasses.fields(opsdc.Config) if f.type in (int, float)]
    assert sorted(numbers) == sorted(RANGES) and "0.01..1" in parser.format_help()

def test_missing_vllm_is_named_with_what_to_install(good, one_rank, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    with pytest.raises(SystemExit):
        opsdc.prepare(opsdc.Config(**good))
    assert "error: vllm is not installed: on a machine with GPUs" in capsys.readouterr().out

def test_too_small_a_disk_and_too_old_a_driver_are_named(good, one_rank, monkeypatch, capsys, tmp_path):
    """16 bytes a parameter a checkpoint here (14 on a GPU), three of them while the third is written."""
    config = opsdc.Config(**good, out=str(tmp_path / "some/out"))
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(good["model"]).parameters())
    free = lambda n: monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=n))
    free(3 * 16 * weights - 1)
    with pytest.raises(SystemExit):
        opsdc.prepare(config)
    said = capsys.readouterr().out
    assert re.search("error: --out .*/some/out: expected .* GB free for checkpoints of .* GB, found", said)
    opsdc.prepare(dataclasses.replace(config, steps=20))  # two checkpoints
    (tmp_path / "some/out/checkpoint-10").mkdir()
    opsdc.prepare(dataclasses.replace(config, resume=True))  # the third is there already
    free(3 * 16 * weights)
    opsdc.prepare(dataclasses.replace(config, out=str(tmp_path / "other")))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(SystemExit):
        opsdc.prepare(config)
    said = capsys.readouterr().out
    assert re.search("error: torch for CUDA 13.0 sees no GPU: expected .* R580 .*, found none; update", said)

DATED = "{{ strftime_now('%d %b %Y') }} " + QWEN_TEMPLATE

def test_a_resumed_run_is_the_same_run(good, one_rank, tmp_path, capsys, monkeypatch):
    """What may be spelled or dated another way, and what may not."""
    out, model = tmp_path / "out", Path(bad_template(tmp_path, good, DATED)["model"])
    settings = dict(good) | dict(model=str(model), out=str(out))
    prepare = lambda **change: opsdc.prepare(opsdc.Config(**settings | change))
    refused = lambda **change: refusal(lambda: prepare(**change), capsys)
    prepare(batch_size=4)
    (out / "metrics.jsonl").write_text('{"step": 1}\n')  # it died before its first checkpoint
    _, problems, *_ = prepare(batch_size=8)
    assert len(problems) == 40 and (out / "metrics.jsonl").read_text() == ""
    (out / "checkpoint-1").mkdir()
    settings |= dict(batch_size=8)
    assert "holds a run (or a model) already; add --resume to its command" in refused()
    settings |= dict(resume=True)
    kept = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(kept | dict(date="2024-07-26")))  # begun another day
    tokenizer, again, *_ = prepare(steps=200)
    assert "the run has steps 100, found 200; going on with the latter" in capsys.readouterr().out
    assert tokenizer.decode(again[0].student).startswith("26 Jul 2024 ")
    assert (json.loads((out / "config.json").read_text())
            == kept | dict(date="2024-07-26", steps=200, resume=True))
    assert again[0].student != problems[0].student
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)
    for name in ("m", "./m/", "link", "../" + tmp_path.name + "/m"):
        prepare(model=name)
    prepare(instruction=" V1")
    prepare(data=str(shutil.copy(good["data"], tmp_path / "copy.jsonl")), lr=1e-4, eval_samples=2)
    capsys.readouterr()
    for change, name in ((broken_data(tmp_path, '{"problem": "x"}\n'), "problems"), (dict(seed=5), "seed"),
                         (dict(model=good["model"]), "model"), (dict(instruction="v2"), "instruction"),
                         (dict(wrapper="none"), "wrapper"), (dict(batch_size=4), "batch_size"),
                         (dict(thinking=False), "thinking"), (dict(refresh_every=3), "refresh_every")):
        assert f"--resume: the run has {name} " in refused(**change)
    (model / "chat_template.jinja").write_text(DATED + " ")
    assert "--resume: the run has template " in refused()
    for text in ("", "[1"):
        (out / "config.json").write_text(text)
        assert f"{out}/config.json, expected the settings of the run" in refused()

def test_what_will_be_trained_is_said_at_the_start(good, one_rank, tmp_path, capsys):
    rows = [dict(problem="one"), dict(problem="one", answer=1), dict(problem="one", answer="1"),
            dict(problem="one", answer=2), dict(problem="two", answer=2),
            dict(problem="long " * 500, answer=3), dict(problem="three", answer=" ")]
    data = broken_data(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    no_switch = bad_template(tmp_path, good, R1_TEMPLATE)
    cfg = opsdc.Config(**good | data | no_switch | dict(out=str(tmp_path / "out"), thinking=False,
                                                        instruction="20%"))
    _, problems, *_ = opsdc.prepare(cfg)
    assert [(p.text, p.answer) for p in problems] == [("one", "1"), ("two", "2"), ("three", None)]
    said = capsys.readouterr().out
    for text in ("reading ", "c: Solve the following math problem correctly using 20% fewer tokens",
                 "7 rows, 3 duplicates (1 with another answer", "1 dropped (a prompt longer than 512 tokens)",
                 "3 left, 1 of them without an answer", "the first student's prompt: '<",
                 "the first teacher's prompt: '<", "<|Assistant|><think>\\n'",
                 "--no_thinking changes nothing"):
        assert text in said, text

def test_bad_input_under_torchrun_exits_once_and_not_0(good, tmp_path):
    done = run(*small_run(good["model"], good["data"], tmp_path / "out", batch_size=3), ranks=2)
    assert done.returncode != 0
    assert done.stdout.count("error: --batch_size 3 is not divisible by the 2 engines") == 1

def test_readme_names_every_option_and_the_lines_of_the_sections():
    readme, lines = (HERE / "README.md").read_text(), (HERE / "opsdc.py").read_text().splitlines()
    assert [f.name for f in dataclasses.fields(opsdc.Config) if f"`--{f.name}`" not in readme] == []
    guide = re.findall(r"^\| (\d+) \| ([A-Z][a-z ]+):", readme, re.MULTILINE)
    assert len(guide) == 13
    assert [title for n, title in guide if not lines[int(n) - 1].endswith(f"- {title.upper()}")] == []

def test_command_line_takes_dashes_and_underscores():
    parse = opsdc.HfArgumentParser(opsdc.Config).parse_args_into_dataclasses
    assert (parse(["--micro-batch-tokens", "5", "--no-thinking"])[0]
            == opsdc.Config(micro_batch_tokens=5, thinking=False))
    assert (parse(["--micro_batch_tokens", "5", "--no_thinking"])[0]
            == opsdc.Config(micro_batch_tokens=5, thinking=False))

def test_opsdc_alone_in_a_folder_trains_without_accuracy(good, tmp_path):
    shutil.copy(HERE / "opsdc.py", tmp_path)
    alone = lambda *more: subprocess.run(
        [sys.executable, "opsdc.py", *map(str, small_run(good["model"], good["data"], "out", steps=1)),
         *more],
        cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": ""}, text=True, timeout=200, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    for more in (["--keep", "correct"], ["--eval_every", "1"]):
        done = alone(*more)
        assert done.returncode == 1 and "error: --keep correct and --eval_every need eval.py" in done.stdout
    done = alone()
    assert done.returncode == 0 and done.stdout.count("no eval.py beside") == 1, done.stdout[-3000:]
    line, = metrics_of(tmp_path / "out")
    assert line["loss"] > 0 and "accuracy" not in line and (tmp_path / "out/model/config.json").exists()
    kept = [json.loads((Path(folder) / "generation_config.json").read_text())["temperature"]
            for folder in (good["model"], tmp_path / "out/model")]
    assert kept == [0.6, 0.6]

def test_imports_without_vllm_or_gpu_and_without_side_effects():
    code = ("import sys, os; before = dict(os.environ); import opsdc, eval; "
            "assert dict(os.environ) == before; "
            "assert 'vllm' not in sys.modules and not opsdc.dist.is_initialized()")
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0

# ------------------------------------------------------------------------------------------------------ forks

def load_fork(names, directory):
    """The forked opsdc.py as a module."""
    fork(names, directory / "forked.py")
    spec = importlib.util.spec_from_file_location("forked", directory / "forked.py")
    module = sys.modules["forked"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.mark.parametrize("name", FORKS)
def test_forks_are_as_short_as_the_readme_says(name, tmp_path):
    lines = fork(name, tmp_path / "fork.py")
    assert lines <= 10 and re.search(rf"\| `{name}` \|.*\| {lines} \|\n", (HERE / "README.md").read_text())

@pytest.mark.parametrize("name, factor, smoother", [
    ("egrsd", lambda kl, student, teacher: (-teacher).exp().clamp(min=0.1), 1),
    ("tip", lambda kl, student, teacher: ((student > 0.1) | (kl > 0.1)).double(), 1),
    ("temperature", lambda kl, student, teacher: torch.ones_like(kl), 1.5)])
def test_forks_of_the_objective(name, factor, smoother, tmp_path):
    """Loss and gradients against float64, on tokens whose entropies go from nothing to log V."""
    hs, ws, ht, wt, weights = objective_inputs(N=60, apart=0.004)
    scale = torch.linspace(0, 12, 60)[:, None]
    inputs = [(hs * scale).requires_grad_(), ws.requires_grad_(), ht * scale, wt, weights]
    loss, _ = load_fork(name, tmp_path).distill_loss(*inputs)
    loss.backward()
    hs64, ws64, ht64, wt64, weights = (x.detach().double() for x in inputs)
    s, t = hs64.requires_grad_() @ ws64.requires_grad_().T, ht64 @ wt64.T / smoother
    kl = exact_divergence(s, t, "reverse_kl")
    student, teacher = (torch.distributions.Categorical(logits=x).entropy().detach() for x in (s, t))
    by = factor(kl.detach(), student, teacher)
    assert smoother != 1 or len(by.unique()) > 1
    exact = (weights * by * kl).sum()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    for x, exact in zip(inputs[:2], (hs64, ws64)):
        assert relative_error(x.grad, exact.grad) < 1e-3

def test_fork_clip_bounds_what_an_entry_gives(tmp_path):
    forked = load_fork("clip", tmp_path)
    hs, ws, ht, wt, weights = objective_inputs(N=60, apart=0.2)
    inputs = [hs.requires_grad_(), ws.requires_grad_(), ht, wt, weights]
    loss, _ = forked.distill_loss(*inputs)
    loss.backward()
    hs64, ws64, ht64, wt64, weights = (x.detach().double() for x in inputs)
    log_p = (hs64.requires_grad_() @ ws64.requires_grad_().T).log_softmax(-1)
    terms = log_p.exp() * (log_p - (ht64 @ wt64.T).log_softmax(-1))
    assert 0.01 < (terms > 0.05).double().mean() / terms.gt(0.01).double().mean() < 0.9
    exact = (weights * terms.clamp(max=0.05).sum(-1)).sum()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for x, exact in zip(inputs[:2], (hs64, ws64)):
        assert relative_error(x.grad, exact.grad) < 1e-5

def test_fork_paced_weighs_four_rollouts_a_problem_by_their_pass_rate(tmp_path):
    forked = load_fork("paced", tmp_path)
    batch = forked.batch_at(10, 0, 8, seed=0)
    assert batch == [batch[0]] * 4 + [batch[4]] * 4 and batch[0] != batch[4]
    rollouts = [forked.Rollout(i, [5] * 7, [-1.0] * 7, True, correct)
                for i, correct in zip(batch, [True, False, False, False] + [True] * 4)]
    weights = forked.token_weights(rollouts)
    assert [w[0] for w in weights] == pytest.approx([3 / 16 / 8 / 7] * 4 + [0] * 4)
    assert [len(w) for w in weights] == [7] * 8

def test_fork_incorrect_keeps_what_is_wrong(tmp_path):
    forked = load_fork("incorrect", tmp_path)
    rollouts = [forked.Rollout(i, [5], [-1.0], True, i == 1) for i in range(3)]
    assert forked.keep_rollouts(rollouts, forked.Config()) == [rollouts[0], rollouts[2]]

def test_fork_ema_moves_thetabar_a_hundredth_of_the_way(good, one_rank, tmp_path):
    forked = load_fork("ema", tmp_path)
    forked.compute_dtype = lambda: torch.bfloat16  # as on a GPU, where thetabar would be rounded
    model = forked.load_model(forked.Config(model=good["model"]), torch.device("cpu"))
    thetabar = forked.snapshot(model)
    before = {name: q.full_tensor().clone() for name, q in thetabar.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for name, q in forked.refresh(model, thetabar, 1, forked.Config()).items():
        assert torch.allclose(q.full_tensor(), before[name] + 0.01, atol=1e-6)

def test_fork_larger_teacher(good, one_rank, tmp_path):
    """Another width and depth, the same tokenizer: the loss is the exact divergence from that model."""
    forked, path = load_fork("larger", tmp_path), make_model(tmp_path / "m", "qwen3", hidden_size=96,
                                                             num_hidden_layers=3, seed=1)
    cfg, device, forked.MAX_GAP = forked.Config(model=good["model"]), torch.device("cpu"), math.inf
    forked.larger = forked.load_model(forked.Config(model=str(path)), device)
    student, teacher = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
                        for model in (cfg.model, path))
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(path))
    model = forked.load_model(cfg, device)
    batches = forked.make_micro_batches(rollouts, problems, device, cfg)
    objective = forked.student_pass(model, batches, *forked.teacher_pass(model, None, batches), cfg)
    assert objective["loss"] == pytest.approx(exact_objective(student, teacher, problems, rollouts).item(),
                                              rel=1e-5)

def test_fork_answer_tells_the_teacher_only(good, one_rank, tmp_path):
    forked, tokenizer = load_fork("answer", tmp_path), AutoTokenizer.from_pretrained(good["model"])
    problem = forked.load_problems(forked.Config(**good), tokenizer, "Be brief.")[2]
    assert problem.text == "What is 2 + 2?" and "The answer is 4." in tokenizer.decode(problem.teacher)
    assert problem.student == opsdc.student_prompt(tokenizer, problem.text)

def test_fork_thinking_lets_the_teacher_think_and_not_the_student(good, one_rank, tmp_path):
    forked, tokenizer = load_fork("thinking", tmp_path), AutoTokenizer.from_pretrained(good["model"])
    problem = forked.load_problems(forked.Config(**good), tokenizer, "Be brief.")[0]
    student, teacher = (tokenizer.decode(ids)[-40:] for ids in (problem.student, problem.teacher))
    assert student.endswith("<think>\n\n</think>\n\n") and "</think>" not in teacher

def test_forks_together_in_a_real_run(good, tmp_path):
    fork("paced+ema+answer+temperature+egrsd+topp", tmp_path / "fork.py")
    data = write_rows(tmp_path / "rows.jsonl")
    succeed(*small_run(good["model"], data, tmp_path / "out", steps=2, batch_size=8),
            script=tmp_path / "fork.py")
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len({row["problem"] for row in samples[:4]}) == 1  # the first four rollouts of a step
    assert len({row["response"] for row in samples[:4]}) == 4
    assert len(metrics_of(tmp_path / "out")) == 2

# ---------------------------------------------------------------------------------------------------- grading

FORMATS = {  # X stands for the value
    "Answer: X": "So it is clear.\n\nAnswer: X",
    "**Answer:** X": "**Answer:** X",
    "**Answer: X**": "Done.\n\n**Answer: X**",
    "Answer: $X$": "Answer: $X$",
    "Answer: \\(X\\)": "Answer: \\(X\\)",
    "backticks": "Answer: `X`",
    "full-width colon": "Answer：X",
    "next line": "Answer:\n\nX",
    "$$ next lines": "**Answer:**\n\n$$\nX\n$$\n",
    "\\[ next lines": "Answer:\n\\[\nX\n\\]",
    "full stop": "Answer: $X$.",
    "special token": "Answer: X<|im_end|>",
    "think block": "<think>\nPerhaps \\boxed{-7919}? Answer: -7919\n</think>\n\nAnswer: X",
    "boxed": "Therefore \\[\\boxed{X}\\]",
    "boxed in the line": "Answer: $\\boxed{X}$.",
}

@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", ["73", "\\frac{5}{7}", "\\$12.40", "(2, -3)", "\\text{Thursday}", "121_3",
                                   "\\begin{pmatrix} 4 \\\\ 9 \\end{pmatrix}"])
def test_every_format_takes_the_right_value_and_refuses_a_wrong_one(name, value):
    right = ev.grade(FORMATS[name].replace("X", value), value)
    assert right.correct and right.either_full_text and not right.truncated and not right.no_answer
    assert not ev.grade(FORMATS[name].replace("X", "74"), value).correct

@pytest.mark.parametrize("answer, gold", [
    ("055", "55"), ("-8", "-08"), ("1,234", "1234"), ("3{,}600", "3600"), ("11,\\!000", "11000"),
    (".75", "0.750"), ("+6", "6"), ("0.75", "\\frac34"), ("\\dfrac{2}{9}", "\\tfrac29"),
    ("\\frac 38", "\\frac{3}{8}"), ("1\\frac{1}{4}", "5/4"), ("30^\\circ", "30"), ("30°", "30^{\\circ}"),
    ("\\$7.50", "7.5"), ("25\\%", "0.25"), ("25\\%", "25%"), ("25 percent", "25\\%"),
    ("\\text{blue}", "Blue"), ("\\mathrm{north}", "\\text{north}"), ("x=9", "9"), ("9", "x=9"),
    ("2\\sqrt{3}", "\\sqrt{12}"), ("2√3", "2\\sqrt3"), ("3π", "3\\pi"), ("−4", "-4"),
    ("5sqrt(2)", "5\\sqrt{2}"), ("\\left(1,\\,2\\right)", "(1,2)"), ("3, 8", "8, 3"),
    ("[-1,4]", "-1 \\le x \\le 4"), ("-1 \\le x \\le 4", "[-1,4]"), ("(t-2)(t+2)", "t^2-4"),
    ("4x+6y=2", "2x+3y=1"), ("12_{7}", "12_7"), ("0.333333333", "\\frac13"), ("2 \\text{ or } 5", "2, 5"),
    ("8 \\text{ cm}", "8"), ("\\boxed{8}", "8"), ("1.0\\times10^{-4}", "0.0001"),
    ("6.02 x 10^{23}", "6.02 \\cdot 10^{23}"), ("x₁+x²", "x_1+x^2"), ("\\sin 30^\\circ", "\\frac12"),
    ("\\ln(xy)", "\\ln x+\\ln y"), ("\\sin^2 x+\\cos^2 x", "1"), ("4 h", "4\\text{ h}"),
    ("33\\frac13\\%", "1/3"), ("0.4\\overline{6}", "7/15"), ("a_i", "a_{i}"),
    ("x<2 \\text{ or } x>3", "(-\\infty,2)\\cup(3,\\infty)"),
    ("3.2e-5", "3.2\\times10^{-5}"), ("e^(2x)", "e^{2x}"), ("2^\\frac12", "\\sqrt2"), ("sin(x)", "\\sin x"),
    ("sqrt(1+sqrt(2))", "\\sqrt{1+\\sqrt2}"), ("\\textcolor{red}{9}", "9"), ("\\bm{16}", "16"),
    ("\\mathbf{\\frac{3}{4}}", "3/4"), ("\\frac{3\\pm i\\sqrt5}{2}", "\\frac32 \\pm \\frac{\\sqrt5}{2}i"),
    ("x \\equiv 4 (mod 9)", "x \\equiv 4 \\pmod{9}"), ("7:20 p.m.", "7:20 \\text{ PM}"),
    ("1'234'567", "1234567"), ("14 stamps", "14"), ("14", "14\\text{ pages}"), ("6.5 kJ/mol", "6.5"),
    ("66 2/3%", "2/3"), ("\\pi r^2h", "\\pi hr^2"), ("Self-adjoint", "self-adjoint"), ("NO", "no"),
    ("60 mph", "60 miles per hour"), ("10 km/h", "10\\text{ km per hour}"), ("2 hr", "2\\text{ hours}"),
])
def test_equal(answer, gold):
    assert ev.grade(f"Answer: {answer}", gold).correct

@pytest.mark.parametrize("answer, gold", [
    ("42 or 43", "42"), ("$42$ or $43$", "42"), ("42, 43", "42"), ("42 (or 43)", "42"), ("not 42", "42"),
    ("42 43", "42"), ("3 5", "35"), ("42", "-42"), ("42.5", "42"), ("3.21", "3.2100001"),
    ("1/2^{99}", "1/2^{98}"), ("(1/2^{99},0)", "(1/2^{98},0)"), ("\\sqrt{10^{40}+1}", "10^{20}"),
    ("6.74\\times10^{-5}", ".0000672"), ("10\\%", "10"), ("10", "10\\%"), ("52_9", "52_8"), ("52", "52_8"),
    ("52_8", "52"), ("seat", "\\text{east}"), ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), ("x=2", "y=2"),
    ("0.33", "1/3"), ("2k", "2k+1"), ("", "42"), ("\\frac{1}{23}", "\\frac{1}{2}3"),
    ("AB", "ab"), ("Ab", "ab"), ("4 h", "4"), ("(3,4)", "3,4"), ("(3,4)", "\\{3,4\\}"), ("1,2,2", "1,1,2"),
    ("7 million", "7"), ("\\angle ABC", "\\angle ACB"), ("0.46", "7/15"), ("x<2, y<3", "y<2, x<3"),
    ("7 millions", "7"), ("7 halves", "7"), ("Mgh", "mgh"), ("2mgH", "2mgh"), ("mgH", "mgh"),
    ("2,4,6,...", "2,4,6"), ("7:20 AM", "7:20 PM"), ("x \\equiv 4 (mod 8)", "x \\equiv 4 \\pmod 9"),
    ("8 plus", "8"), ("f(x) increases", "f(x)"), ("7 cm", "7\\text{ m}"), ("7 hours", "7 minutes"),
    ("12 cm", "12\\text{ inches}"), ("7\\text{ cents}", "7 dollars"),
])
def test_not_equal(answer, gold):
    assert not ev.grade(f"Answer: {answer}", gold).correct

@pytest.mark.parametrize("answer, right", [("C", True), ("(C)", True), ("C)", True), ("C.", True),
                                           ("C) 14 m", True), ("(C) 14", True), ("\\text{C}", True),
                                           ("**C**", True), ("**C**: 5", True), ("C because", True),
                                           ("B", False), ("c", False), ("B or C", False),
                                           ("C) or B)", False), ("B, C", False), ("Carbon", False),
                                           ("14 m", False), ("[C]", True), ("option C", True),
                                           ("[C] or [B]", False), ("option B", False)])
def test_multiple_choice_by_exact_letter(answer, right):
    assert ev.grade(f"Answer: {answer}", "C").correct is right
    assert ev.grade(f"So \\boxed{{{answer}}}", "\\text{(C)}").correct is right

def test_where_the_answer_is():
    def taken(text):
        return ev.grade(text, "5").answer
    assert taken("Answer: 4\nNo, wait.\nAnswer: 5") == "5"  # the last line
    # the later of the two
    assert taken("\\boxed{4}\nAnswer: 5") == "5" and taken("Answer: 4\nso \\boxed{5}") == "5"
    assert taken("\\boxed{5}, then \\boxed{unbalanced") == "5" and taken("\\boxed{5}\nAnswer:") == "5"
    assert taken("\\boxed{\\{5\\}}") == "\\{5\\}" and taken("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert taken("The final answer: 5") == "5" and taken("## Final Answer: $5$") == "5"
    assert taken("\\textbf{Answer: 5}") == "5" and taken("Correct answer: 5 ✅") == "5"
    assert taken("Answer: The correct choice is **5**.") == "5" and taken("Answer: the value is not 5") != "5"
    assert (taken("Answer: $\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}$\nas said")
            == "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}")
    assert taken("Answer: 5\nThat was it.") == "5" and taken("Answer: $5.00\nand $x$ is free") == "5.00"
    assert taken("Answer: 5<｜end▁of▁sentence｜>") == "5" and taken("Answer: 5</s>") == "5"
    for nothing in ("The result is 5", "= 5", "5", "", "answered: 5", "Answer: \n", "Answer: **"):
        verdict = ev.grade(nothing, "5")
        assert (verdict.answer is None and verdict.no_answer and not verdict.correct
                and not verdict.truncated), nothing
    # a reference solution
    assert ev.grade("Answer: 1/2", "We find $x=\\boxed{3}$, so the answer is \\boxed{\\frac{1}{2}}.").correct

def test_only_the_text_after_the_last_think_counts():
    inside = "<think>\nAnswer: 5, \\boxed{5}\n</think>\nAnswer: 6"
    verdict = ev.grade(inside, "5")
    assert ((verdict.correct, verdict.answer_only, verdict.boxed_only, verdict.either_full_text)
            == (False, False, False, True))
    assert ev.grade(inside, "6").correct
    assert ev.grade("opened by the template \\boxed{4}</think>Answer: 5", "5").correct
    for cut in (ev.grade("Answer: 5", "5", finished=False), ev.grade("<think> \\boxed{5} Answer: 5", "5"),
                ev.grade("<think>a</think>\nAnswer: 5\n<think> again", "5")):
        assert ((cut.correct, cut.answer, cut.truncated, cut.no_answer, cut.either_full_text)
                == (False, None, True, False, True))
    only_line, only_box = ev.grade("\\boxed{4}\nAnswer: 5", "5"), ev.grade("Answer: 4\n\\boxed{5}", "5")
    assert (only_line.correct, only_line.answer_only, only_line.boxed_only) == (True, True, False)
    assert (only_box.correct, only_box.answer_only, only_box.boxed_only) == (True, False, True)

def test_hostile_input_is_wrong_within_seconds_and_others_are_not_touched():
    ev.grade("Answer: \\sqrt{4}", "2")  # the worker's start is not what is measured
    text = ["[" * 10**6, "\\boxed{" * 10**5, "{" * 10**6 + "}" * 10**6, "Answer" + " " * 10**6, "*" * 10**6,
            "Answer:" * 10**4, "Answer: " + "(" * 900, "Answer: " + "9" * 10**6, "Answer: 9^9^9^9",
            "Answer: \\frac{1}{0}"]
    start = time.time()
    assert not any(v.correct for v in ev.grade_all(text, ["7"] * len(text)))
    assert time.time() - start < 30
    stuck = ["Answer: $9^{9^{9^9}}$", "Answer: \\sqrt{49}", "Answer: $8^{8^{8^8}}$", "Answer: 14/2",
             "Answer: 8/2"]
    start = time.time()
    assert [v.correct for v in ev.grade_all(stuck, ["7"] * 5, workers=2)] == [False, True, False, True, False]
    assert time.time() - start < 60
    assert ev.grade("Answer: 21/3", "7").correct  # the killed workers were replaced

def test_one_worker_and_three_give_the_same_verdicts_in_order_and_quickly():
    rng = random.Random(0)
    pairs = [(f"Answer: \\frac{{{rng.randint(1, 9)}}}{{{rng.randint(1, 9)}}}", str(rng.randint(1, 3)))
             for _ in range(32)]
    texts, golds = zip(*pairs)
    one = ev.grade_all(texts, golds, workers=1)
    ev.grade_all(texts, golds, workers=3)
    start = time.time()
    three = ev.grade_all(texts, golds, workers=3)
    assert time.time() - start < 5  # warm: about 0.1 s; the rest is room for a busy machine
    assert one == three == [ev.grade(*pair) for pair in pairs] and {v.correct for v in one} == {True, False}

def cpu_time():
    """Seconds of CPU of this process and its grading workers: those of the clock depend on the load."""
    stats = [Path(f"/proc/{w.pid}/stat").read_text().rpartition(")")[2].split() for w in ev.IDLE]
    return time.process_time() + sum(int(s[11]) + int(s[12]) for s in stats) / os.sysconf("SC_CLK_TCK")

def test_a_long_value_costs_nothing_and_a_thousand_responses_six_seconds():
    ev.grade("Answer: \\sqrt{4}", "2")  # a worker is there: its start is not what is measured
    long = "~" * 3900
    for text, gold in (("Answer: " + long, "7"), ("Answer: 7", long), ("\\boxed{" + long + "}", "7")):
        start = cpu_time()
        assert not ev.grade(text, gold).correct
        assert cpu_time() - start < 0.05, text[:20]  # measured: 0.001
    filler = "we find that the value of $x^2$ is \\frac{1}{2} so (a+b) = 3. Then { } answer " * 250
    texts = [f"{filler}{i}\nAnswer: \\frac{{{i}}}{{2}}" for i in range(1000)]
    start = cpu_time()
    assert sum(v.correct for v in ev.grade_all(texts, ["7"] * 1000, workers=1)) == 1 and len(texts[0]) > 19000
    assert cpu_time() - start < 6  # on one core, so on two; measured: 3.4

def test_grading_loads_neither_torch_nor_vllm_nor_opsdc():
    code = ("import sys, eval; v = eval.grade('Answer: $\\\\frac{2}{4}$', '0.5'); "
            "print(v.correct, [m for m in ('torch', 'vllm', 'opsdc', 'sympy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True []", done.stderr

GOLDS = ["\\frac{3}{4}", "-\\frac{7\\pi}{12}", "12345", "\\left( 3, \\frac{\\pi}{2} \\right)", "x^2 - 5x + 6",
         "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}", "[-2,7)",
         "(-\\infty, -2) \\cup (3, \\infty)",
         "\\begin{pmatrix} 1 & -2 \\\\ 3 & 4 \\end{pmatrix}", "2 - 3i", "4 + 2\\sqrt{3}", "1,2,5",
         "y = 2x + 3",
         "11 \\text{ meters}", "\\text{Thursday}", "3 \\pm 2\\sqrt{2}", "\\{1,4,9\\}", "5(x + 2)(x - 2)"]

def respelled(gold):
    """Other spellings of the same value, made by rules."""
    bare, tight = "\\text" not in gold, not re.search(r"\\ |\\text", gold.replace("\\\\", ""))
    changes = [(r"(?<![a-zA-Z\d]) +| +(?![a-zA-Z\d])", "")] * tight + [
        (r"([+=&]|\\\\)", r" \1 "), (r"(?<=[(+=]) ?" if bare else "^", r"\\,"), (r"\\frac", r"\\dfrac"),
        (r"\\frac\{(\d)\}\{(\d)\}", r"\\tfrac\1\2"),
        (r"\\text\{", r"\\mathrm{"), (r"(?<![\d.,_{])\d{4,}(?![\d.,_}])", lambda m: f"{int(m[0]):,}")]
    if gold.count("(") == gold.count(")") and "\\left" not in gold and bare:
        changes.append((r"([()])", lambda m: ("\\left" if m[1] == "(" else "\\right") + m[1]))
    return {re.sub(pattern, by, gold) for pattern, by in changes} - {gold}

def mutated(gold):
    """Other values, one change away: a sign, a digit, two cells, an end of an interval, an operator."""
    places = [(m.start(), m.end(), by(m[0])) for pattern, by in (
        (r"(?<!\\)(?<![a-zA-Z])\d", lambda d: str((int(d) + 1) % 10) if d != "9" else "4"),
        (r"\+", lambda _: "-"), (r"(?<=[\d)}a-z] )-|^-", lambda _: "+"), (r"\\cup", lambda _: "\\cap"),
        (r"(?<=^)\[|(?<=cup )\[", lambda _: "("), (r"\](?=$)|\](?= \\cup)", lambda _: ")"))
        for m in re.finditer(pattern, gold)]
    found = {gold[:a] + by + gold[b:] for a, b, by in places}
    if re.fullmatch(r"\d+(\.\d+)?|\\frac\{\d+\}\{\d+\}", gold) and gold != "0":
        found.add("-" + gold)
    for cells in (r"^(\\begin\{pmatrix\}|(?:\\left)?\()([^,&\\]+)(,|&|\\\\)([^,&\\]+)(?=&|\\|\)|,)",):
        swap = re.match(cells, gold)
        if swap and swap[2].strip() != swap[4].strip():
            found.add(gold.replace(swap[0], "{}{}{}{}".format(swap[1], swap[4], swap[3], swap[2])))
    return found

def accepted_shares(golds):
    """(share of the respellings that is accepted, share of the mutations, what is wrong)."""
    shares, wrong = [], []
    for kind, expected in ((respelled, True), (mutated, False)):
        pairs = [(x, gold) for gold in golds for x in sorted(kind(gold))]
        right = [v.correct for v in ev.grade_all([f"Answer: ${x}$" for x, _ in pairs], [g for _, g in pairs])]
        wrong += [pair for pair, accepted in zip(pairs, right) if accepted is not expected]
        shares.append(sum(right) / len(pairs))
    return *shares, wrong

def test_respelled_golds_are_accepted_and_mutated_ones_are_not():
    assert len(set().union(*map(respelled, GOLDS))) > 30 and len(set().union(*map(mutated, GOLDS))) > 50
    assert accepted_shares(GOLDS) == (1, 0, [])

@pytest.mark.skipif(not MATH500.is_file(), reason=f"{MATH500} is not there")
def test_math500_respelled_and_mutated():
    golds = [json.loads(line)["answer"] for line in MATH500.read_text().splitlines()]
    same, other, wrong = accepted_shares(golds)
    assert same >= 0.995 and other <= 0.002, (same, other, wrong)

@pytest.mark.skipif(not MATH500.is_file(), reason=f"{MATH500} is not there")
def test_whole_math500_file():
    rows = [json.loads(line) for line in MATH500.read_text().splitlines()]
    golds, solutions = [row["answer"] for row in rows], [row["solution"] for row in rows]

    def accepted(texts, finished=None):
        return [v.correct for v in ev.grade_all(texts, golds, finished)]
    # the next row's gold that differs: as a string, and mathematically (asked of sympy, not of what is
    # tested)
    wrong = [next(g for g in golds[i + 1:] + golds if value(g) != value(golds[i])) for i in range(len(golds))]
    figures = {"references": sum(accepted(solutions)),
               "cut before the last box": sum(accepted([s[:s.rfind("\\boxed")] for s in solutions],
                                                       [False] * len(rows))),
               "nothing but cut before the first box":
                   sum(accepted([s[:s.find("\\boxed")] for s in solutions])),
               "contradictory": sum(accepted([f"<think>\nIt is \\boxed{{{g}}}.\n</think>\nAnswer: {w}"
                                              for g, w in zip(golds, wrong)]))}
    # one call: equal pairs are asked once
    texts = [text.replace("X", x) for text in FORMATS.values() for x in golds + wrong]
    verdicts = iter(v.correct for v in ev.grade_all(texts, (golds + golds) * len(FORMATS)))
    for name in FORMATS:
        figures[name] = sum(next(verdicts) for _ in golds), sum(next(verdicts) for _ in wrong)
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    assert len(rows) == 500 and figures.pop("references") >= 499
    assert figures.pop("cut before the last box") == figures.pop("nothing but cut before the first box") == 0
    assert figures.pop("contradictory") <= 1
    for name, (right, other) in figures.items():
        assert right >= 490 and other <= 1, (name, right, other)

def value(gold):
    """Plain reading of a gold, independent of eval.py, to tell which other rows hold an equal one."""
    gold = re.sub(r"\s|\\[,!;]|\\left|\\right|\\text|\\mbox|\^\\circ|\\\$|[{}]", "",
                  gold.replace("dfrac", "frac")).rpartition("=")[2]
    try:
        return float(re.sub(r"^\\frac(\d)(\d+)$|^\\frac(\d\d)(\d\d)$", r"\1\3/\2\4", gold).replace(",", ""))
    except ValueError:
        return gold.casefold()

# ---------- benchmarks: the hub's own fields and layout in a local folder, through the same load_dataset call

def hub_copy(folder, rows, split, configuration=None):
    """A folder as the hub serves it: data files and, with a named configuration, the README's metadata."""
    import datasets
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{split}.parquet"))
    if configuration:
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n"
                                          f"  - split: {split}\n    path: {split}.parquet\n---\n")
    return folder

def test_benchmarks_load_with_the_fields_of_the_hub(tmp_path):
    math_row = {"problem": "What is $1+1$?", "solution": "\\boxed{2}", "answer": "2", "subject": "Algebra",
                "level": 3, "unique_id": "a/1.json"}
    got = ev.load_problems(f"math500={hub_copy(tmp_path / 'm', [math_row], 'test')}")
    assert got == [{"id": "a/1.json", "problem": "What is $1+1$?", "answer": "2", "level": 3}]
    rows = [{"id": i, "problem": f"p{i}", "solution": "s", "answer": f"0{i}", "url": "u", "year": "2024"}
            for i in (60, 61)]
    assert ([p["answer"] for p in ev.load_problems(f"aime24={hub_copy(tmp_path / 'a', rows, 'train')}")]
            == ["060", "061"])
    rows = [{"problem": "p", "answer": 70, "id": "0"}]
    assert ev.load_problems(f"aime25={hub_copy(tmp_path / 'b', rows, 'test')}")[0]["answer"] == "70"

def test_multiple_choice_is_shuffled_by_the_question_and_keeps_its_letter(tmp_path):
    rows = [{"Question": f"Which is {i}?", "Correct Answer": f"it is {i}\n", "Incorrect Answer 1": "red",
             "Incorrect Answer 2": "green", "Incorrect Answer 3": "blue", "Record ID": f"rec{i}"}
            for i in range(40)]
    gpqa = ev.load_problems(f"gpqa_diamond={hub_copy(tmp_path / 'g', rows, 'train', 'gpqa_diamond')}")
    rows = [{"question": f"Which is {i}?", "subject": "s", "choices": ["red", "green", f"it is {i}", "blue"],
             "answer": 2} for i in range(40)]
    mmlu = ev.load_problems(f"mmlu={hub_copy(tmp_path / 'u', rows, 'test', 'all')}")
    for problems in (gpqa, mmlu):
        assert {p["answer"] for p in problems} == set("ABCD") and len({p["id"] for p in problems}) == 40
        for i, p in enumerate(problems):
            lines = p["problem"].split("\n")
            assert lines[0] == f"Which is {i}?"
            assert f"({p['answer']}) it is {i}" in lines
            assert (sorted(line[4:] for line in lines if line[:1] == "(")
                    == sorted(["red", "green", "blue", f"it is {i}"]))
    again = ev.load_problems(f"mmlu={tmp_path / 'u'}")
    assert again == mmlu

def test_problem_files_and_their_faults(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "a", "answer": 3}\n{"question": "b", "solution": "so \\\\boxed{4}"}\n')
    assert ([(p["problem"], p["answer"]) for p in ev.load_problems(str(file))]
            == [("a", "3"), ("b", "4")])
    row, choices = '{"problem": "a", "answer": 3}\n', '{"question": "a", "choices": %s, "answer": %s}\n'
    for text, message in ((row + '{"problem"\n', "line 2"), ('{"task": "a"}\n', "found task"),
                          ("5\n", "line 1: expected a JSON object"), ("", "found 0 rows"),
                          ('{"problem": "a"}\n', "line 1: expected a field answer"),
                          ('{"problem": "a", "answer": " "}\n', "line 1: expected a field answer"),
                          (row.replace("}", ', "id": 1}') + '{"problem": "b", "answer": 3, "id": 1}\n',
                           "found 2 rows and {.1.: 2}"),
                          (row.replace("}", ', "id": ["1"]}'),
                           "line 1, unique_id, id or level: expected a text"),
                          (row.replace("}", ', "level": {}}'),
                           "line 1, unique_id, id or level: expected a text"),
                          (choices % ("null", 1) + "\n" + choices % ('["x", null]', 1),
                           "line 3, a question with choices: expected"),
                          (choices % ('["x", "y"]', 2),
                           "line 1, a question with choices: expected a question, up to ten texts"),
                          (choices % ('["x", "y"]', '"B"'), "line 1, a question with choices: .*'B'"),
                          (choices % ('"xy"', 1), "line 1, a question with choices: expected")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            ev.load_problems(str(file))
    leveled = row.replace("}", ', "level": 1.50}')  # once more: how verl's aime-2024.parquet repeats problems
    file.write_text(leveled * 32 + '{"problem": "a", "answer": 4}\n'
                    + choices % ('"[\\"x\\", \\"y\\"]"', '"1"'))
    one, other = ev.load_problems(str(file))
    assert one == {"id": "0", "problem": "a", "answer": "3", "level": "1.50"} and "y" in other["problem"]
    assert "34 rows are 2 problems; 1 rows have another answer" in capsys.readouterr().out
    assert ev.load_problems(str(file), "none")[0] == one
    with pytest.raises(ValueError, match="math500.*mmlu"):
        ev.load_problems("math501")
    with pytest.raises(ValueError, match="hub page.*gpqa_diamond=DIR"):
        ev.load_problems(f"gpqa_diamond={tmp_path / 'absent'}")

# ------------------------------------------------------------------------------------------------- statistics

def record(problem, sample, correct, tokens, level=None, answer="7", **more):
    return {"id": problem, "sample": sample, "correct": correct, "tokens": tokens, "level": level,
            "answer": answer, "vote": answer, "gold": "5",
            "think_tokens": tokens - 2, "answer_tokens": 2, "truncated": False,
            "no_answer": answer is None, "answer_only": correct, "boxed_only": False,
            "either_full_text": correct, "problem_hash": ev.digest(problem), **more}

def test_summary_against_values_worked_out_by_hand():
    records = [record("a", 0, True, 10, 1), record("a", 1, False, 30, 1), record("b", 0, True, 20, 2),
               record("b", 1, True, 40, 2), record("c", 0, False, 60, 2, answer=None),
               record("c", 1, False, 80, 2, truncated=True)]
    s = ev.summarise(records)
    assert (s["problems"], s["samples"], s["k"]) == (3, 2, 2)
    # means 0.5, 1, 0
    assert s["accuracy"] == pytest.approx(0.5) and s["accuracy_se"] == pytest.approx(0.5 / math.sqrt(3))
    assert ((s["tokens"], s["tokens_median"], s["tokens_correct"], s["tokens_correct_median"])
            == (40, 35, 70 / 3, 20))
    assert (s["think_tokens"], s["answer_tokens"]) == (38, 2)
    assert s["truncated"] == s["no_answer"] == pytest.approx(1 / 6) and s["pass_at_k"] == pytest.approx(2 / 3)
    assert s["majority_at_k"] == pytest.approx((0.5 + 1 + 0) / 3)  # a: one vote each
    assert s["levels"]["1"]["accuracy"] == 0.5 and s["levels"]["2"]["tokens"] == 50
    assert ev.summarise(records, 1)["pass_at_k"] == pytest.approx(0.5)  # pass@1 is the accuracy

def test_clustered_error_grows_when_samples_agree():
    """Eight samples that agree are one observation, eight independent ones are eight."""
    rng = random.Random(1)
    same = [record(str(i), j, c, 10) for i in range(200) for c in [rng.random() < 0.5] for j in range(8)]
    free = [record(str(i), j, rng.random() < 0.5, 10) for i in range(200) for j in range(8)]
    assert ev.summarise(same)["accuracy_se"] == pytest.approx(math.sqrt(0.25 / 200), rel=0.05)
    assert ev.summarise(free)["accuracy_se"] == pytest.approx(math.sqrt(0.25 / 1600), rel=0.15)

def test_pass_at_k_equals_the_count_over_all_subsets():
    for n, c, k in ((8, 3, 4), (8, 0, 2), (8, 8, 1), (5, 2, 5), (6, 1, 3)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))

def test_majority_counts_equal_answers_as_one_vote_however_spelled():
    def share(*votes):
        verdicts = ev.grade_all([f"Answer: {v}" if v else "none" for v in votes], ["5"] * len(votes))
        return ev.majority([v._asdict() for v in verdicts])
    assert share("5", "7", "5") == 1 and share("7", "7", "5") == 0 and share("5", "7") == 0.5
    assert share(None, None, "5") == 1 and share(None) == 0
    assert share("5", "\\frac{10}{2}", "7", "7", "5.0") == 1
    for wrong in (("3", "3.0", "\\frac{6}{2}"), ("\\frac12", "\\frac{1}{2}", "0.5"), ("x=3", "3"),
                  ("2\\sqrt3", "\\sqrt{12}"),
                  ("(x+1)^2", "x^2+2x+1"), ("1, 2", "2,1.0"), ("(1,2)", "(1, \\frac{4}{2})"),
                  ("7 cm", "7\\text{ cm}"), ("\\text{No}", "no"), ("12_7", "12_{7}"),
                  ("9" * 1200, "9" * 1200)):
        assert share(*wrong, "5") == (0 if len(wrong) > 1 else 0.5) and share(wrong[0], "5") == 0.5, wrong
        assert share(*wrong, *["5"] * len(wrong)) == 0.5, wrong
    assert share("(1,2)", "(2,1)", "5", "5") == share("3", "-3", "5", "5") == share("2x", "2y", "5", "5") == 1
    # choices: one vote for B, however it is argued
    told = ev.grade_all([f"Answer: {a}" for a in ("B", "(B) 7", "B because", "C", "C")], ["C"] * 5)
    assert ev.majority([v._asdict() for v in told]) == 0

def test_statistics_refuse_what_has_no_meaning():
    a, b = [record("a", i, True, 10) for i in range(2)], [record("b", 0, False, 20)]
    for records, k, found in ((a + b, None, "3 records with 1 or 2 samples"), (a, 3, "2 records with 2"),
                              ([], None, "0 records with no samples")):
        with pytest.raises(ValueError, match=found):
            ev.summarise(records, k)
    with pytest.raises(ValueError, match="found 1 and 1, of which 0"):
        ev.paired(a, b)
    with pytest.raises(ValueError, match="found 0 and 0"):
        ev.paired([], [])
    with pytest.raises(ValueError, match="no tokens at all"):
        ev.paired([record("a", 0, True, 0)], [record("a", 0, True, 5)])

def test_paired_bootstrap():
    rng = random.Random(2)
    base, ours = [], []
    for i in range(100):  # length varies 100-fold between problems; every problem is halved, give or take 2 %
        length, p = 10 ** rng.uniform(2, 4), rng.random()
        for j in range(4):
            base.append(record(str(i), j, rng.random() < p, length))
            ours.append(record(str(i), j, rng.random() < p, length * rng.uniform(0.49, 0.51)))
    value, low, high = ev.paired(base, ours)["reduction"]
    # pairing takes the spread out
    assert low < value < high and value == pytest.approx(0.5, abs=0.01) and high - low < 0.01
    change, low, high = ev.paired(base, ours)["change"]
    half = {i: sum(r["correct"] for r in ours if r["id"] == i) / 4
                - sum(r["correct"] for r in base if r["id"] == i) / 4
            for i in {r["id"] for r in base}}
    width = 1.96 * statistics.stdev(half.values()) / 10  # what the normal approximation says
    assert low < change < high and (high - low) / 2 == pytest.approx(width, rel=0.1)
    assert ev.paired(base, base) == {"reduction": (0, 0, 0), "change": (0, 0, 0)}
    # matched by problem, not by position
    assert ev.paired(base, list(reversed(ours))) == ev.paired(base, ours)

# ----------------------------------------------------------------------------------------- compare and curves

SETTINGS = {"version": ev.VERSION, "model": "Qwen/Qwen3-8B", "instruction": None, "prompt": "p", "k": 2,
            "samples": 2, "max_tokens": 100, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 0,
            "thinking": True}

def fake_run(folder, shorter=1.0, problems=30, name="math500", finished=True, **settings):
    rng = random.Random(3)
    records = [record(f"p{i}", j, rng.random() < 0.9 - 0.1 * (i % 3),
                      round(rng.uniform(900, 1100) * (1 + i % 3) * shorter ** (3 - i % 3)), 1 + i % 3)
               for i in range(problems) for j in range(2)]
    ev.write_summary(folder, {**SETTINGS, **settings}, {name: records}, finished)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)

def is_picture(path):
    from matplotlib import image
    pixels = image.imread(path)
    return min(pixels.shape[:2]) > 400 and pixels.std() > 0.01

def test_compare_prints_table_published_rows_and_picture(tmp_path, capsys):
    base, ours = fake_run(tmp_path / "base"), fake_run(tmp_path / "ours", 0.8, model="out/model")
    more = fake_run(tmp_path / "more", 0.7, model="out2/model", instruction="c", seed=1)
    ev.main(["compare", base, ours, more, "--plot", str(tmp_path / "x.png"), "--show", "2"])
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert {line[1] for line in lines[2:]} == {"all", "1", "2", "3"}
    a, b = (ev.read_run(run)[1]["math500"] for run in (base, ours))
    expected = 1 - sum(r["tokens"] for r in b) / sum(r["tokens"] for r in a)
    assert lines[2][6].startswith(f"{100 * expected:.1f} [") and lines[2][0] == ours
    reductions = [float(line[6].split()[0]) for line in lines[3:6]]
    assert reductions[0] > reductions[1] > reductions[2] > 15  # easy problems were shortened more
    assert ["paper: trained v2", "all", "", "95.7 -> 95.7", "+0.0", "4884 -> 3339", "31.6"] in lines
    assert "accuracy up on 0 problems, down on 0, as before on 30" in text and is_picture(tmp_path / "x.png")

def test_compare_shows_what_was_won_and_lost(tmp_path):
    base = [record("a", 0, True, 10), record("b", 0, False, 20), record("c", 0, True, 30),
            record("d", 0, False, 40)]
    ours = [record("a", 0, False, 5), record("b", 0, True, 6), record("c", 0, True, 7),
            record("d", 0, False, 8)]
    assert ev.won_and_lost(base, ours, 1).splitlines() == [
        "accuracy up on 1 problems, down on 1, as before on 2", "  +100.0 points, 20 -> 6 tokens: b (gold 5)",
        "  -100.0 points, 10 -> 5 tokens: a (gold 5)"]

@pytest.mark.parametrize("change, message", [
    ({"temperature": 1.0}, "temperature is 0.6 and 1.0"),
    ({"max_tokens": 50, "top_k": 1}, "max_tokens is 100 and 50; top_k"),
    ({"problems": 29}, "1 problems only in the first.*p29"), ({"name": "aime24"}, "math500.*aime24"),
    ({"version": 0}, "version 0"), ({"finished": False}, "not finished")])
def test_compare_refuses(tmp_path, change, message):
    base, ours = fake_run(tmp_path / "base"), fake_run(tmp_path / "ours", **change)
    with pytest.raises(SystemExit, match=message):
        ev.main(["compare", base, ours, "--plot", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()
    for missing in (tmp_path / "nothing", tmp_path / "base"):
        shutil.rmtree(missing, ignore_errors=True)
        with pytest.raises(SystemExit, match="with its summary.json; found FileNotFoundError"):
            ev.main(["compare", str(missing), ours])

def test_damaged_records_are_named_by_line(tmp_path):
    base, ours = fake_run(tmp_path / "base"), fake_run(tmp_path / "ours")
    file = tmp_path / "ours/math500.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit, match="59 lines, summary.json says 30 problems of 2"):
        ev.main(["compare", base, ours])
    file.write_text("".join(lines[:3] + ["{oops\n"] + lines[4:]))
    with pytest.raises(SystemExit, match="math500.jsonl, line 4"):
        ev.main(["compare", base, ours])

def test_curves_of_two_training_runs(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "metrics.jsonl", "w") as file:
            for step in range(60):
                row = {"step": step, "loss": 0.3 * 0.97 ** step, "grad_norm": 1 / (1 + step),
                       "response_tokens": 70 - step / 2, "truncated": 0.0, "student_entropy": 0.3,
                       "teacher_entropy": 0.31, "accuracy": None if name == "two" else 0.9,
                       "teacher_age": step % 20,
                       **({"eval_accuracy": 0.9, "eval_tokens": 60} if step % 10 == 0 else {})}
                file.write(json.dumps(row) + "\n")
            file.write('{"step": 60, "lo')  # a run that is still writing
    runs = [str(tmp_path / name) for name in ("one", "two")]
    ax = ev.pyplot().figure().add_subplot()
    ev.draw_run(ax, ev.read_lines(tmp_path / "one" / "metrics.jsonl"), ("loss", "eval_accuracy"), "C0", "one")
    # refreshes after steps 19 and 39
    assert [list(line.get_xdata()) for line in ax.lines[2:]] == [[19.5, 19.5], [39.5, 39.5]]
    assert [len(line.get_xdata()) for line in ax.lines[:2]] == [60, 6]
    ev.main(["curves", *runs, "--plot", str(tmp_path / "c.png")])
    assert is_picture(tmp_path / "c.png")
    with pytest.raises(SystemExit, match="metrics.jsonl"):
        ev.main(["curves", str(tmp_path), "--plot", str(tmp_path / "d.png")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        ev.main(["curves", *runs, "--plot", str(tmp_path / "d.png")])
    assert not (tmp_path / "d.png").exists()

# ------------------------------------------------------------------------------------ the toy, both commands
# Last, since the toy is made in the background of all the tests above.

def test_toy_does_what_its_table_says_and_both_kinds_of_checks_matter(toy):
    """Rates under each prompt, by level, beside RATES: so short a training leaves checks off by up to 0.08,
    slips by 0.05, going astray by 0.007 (three toys: avx2 with seeds 1 and 2, no vectors with seed 2)."""
    model = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    rows, right = ev.read_lines(toy / "eval.jsonl"), {}
    tolerances = {"wrong": 0.1, "check": 0.2, "again": 0.2, "astray": 0.02}
    torch.manual_seed(0)
    for kind in ("", *TOLD):
        found, right[kind] = toy_rates(model, tokenizer, rows, kind)
        print(kind, {event: round(value, 3) for event, value in found.items()}, right[kind])
        for level, (event, tolerance) in itertools.product(LEVELS, tolerances.items()):
            if event != "astray" or not kind:  # told to be brief, it hardly gets there
                expected = rate(event, kind if event in ("check", "again") else "", level)
                assert found[event, level] == pytest.approx(expected, abs=tolerance), (kind, event, level)
        slips = [found["wrong", level] for level in LEVELS]
        assert slips == sorted(slips), kind
        assert kind or max(found["wrong check", level] for level in LEVELS) < slips[-1] / 2
    mean = {kind: statistics.fmean(of.values()) for kind, of in right.items()}
    assert mean["v2"] > mean[""] + 0.05 and mean["v2"] > mean["v1"] and right["v2"][6] > right["v1"][6]

def test_faults_of_wrong_answers_to_the_toys_problems():
    fault_of = lambda *lines: fault("\n".join(["<think>", *lines, "</think>"]), "Add modulo 10: b8 a5")
    assert fault_of("0 + b8 = 9", "9 + a5 = 4") == "a slip unchecked"
    assert fault_of("0 + b8 = 8", "check 0 + b8 = 8", "recheck 0 + b8 = 7",
                    "7 + a5 = 2") == "a further check astray"
    assert fault_of("0 + b8 = 8", "check 0 + b8 = 8") == "a term left out"
    assert fault_of("0 + b8 = 8", "8 + a5 = 3", "3 + a5 = 8") == "a term again"
    assert fault_of("0 + b8 = 8", "8 + a6 = 4") == "other terms"
    assert fault_of("0 + b8 = 8", "check 0 + b8 = 7", "7 + a5 = 2") == "else"

@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    """The README's training of the toy on two ranks, with an evaluation at its first and last step."""
    out = tmp_path_factory.mktemp("trained") / "out"
    few = out.parent / "few.jsonl"
    few.write_text("".join((toy / "eval.jsonl").read_text().splitlines(keepends=True)[:41]))
    succeed(*TOY_RUN, "--model", toy / "model", "--data", toy / "train.jsonl", "--out", out,
            "--eval_every", 59, "--eval_data", few, "--eval_samples", 2, ranks=2)
    return out

def test_toy_learns_to_be_brief_without_being_told(toy, trained, tmp_path):
    """The paper's claim, end to end: about half the tokens, and better answers, told nothing."""
    def evaluate(name, model):
        succeed("--model", model / "model", "--data", toy / "eval.jsonl", "--out", tmp_path / name, *TOY_EVAL,
                script="eval.py")

    with ThreadPoolExecutor() as pool:  # a core each
        list(pool.map(evaluate, ("base", "ours"), (toy, trained)))
    base, ours = (json.loads((tmp_path / name / "summary.json").read_text())["benchmarks"]["eval"]
                  for name in ("base", "ours"))
    print(f"tokens {base['tokens']:.1f} -> {ours['tokens']:.1f}, "
          f"accuracy {base['accuracy']:.1%} -> {ours['accuracy']:.1%}")
    assert base["problems"] >= 300 and ours["tokens"] <= 0.6 * base["tokens"]
    assert ours["accuracy"] >= base["accuracy"] + 0.05

def test_metrics_of_the_toy_run(trained):
    lines = metrics_of(trained)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert max(line["logprob_gap_max"] for line in lines) < 1e-4
    assert all(line["skipped_updates"] == 0 for line in lines)
    assert [line["teacher_age"] for line in lines] == list(range(60))  # frozen
    assert lines[0]["loss"] > 5 * lines[59]["loss"]
    known = {"loss", "grad_norm", "lr", "response_tokens", "response_tokens_min", "response_tokens_max",
             "truncated", "accuracy", "student_entropy", "teacher_entropy", "logprob_gap", "seconds_sync",
             "seconds_generate", "seconds_teacher", "seconds_student", "seconds_step", "tokens_per_second",
             "peak_memory_gib"}
    assert all(line[name] is not None for line in lines for name in known)
    assert [line["step"] for line in lines if "eval_tokens" in line] == [1, 60]
    assert lines[59]["eval_tokens"] < 0.65 * lines[0]["eval_tokens"] and lines[59]["eval_accuracy"] > 0.8
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 240 and "</think>\nAnswer: " in samples[-1]["response"] and samples[-1]["finished"]

def test_exported_model_is_a_plain_hugging_face_model(toy, trained):
    model, tokenizer = (kind.from_pretrained(trained / "model")
                        for kind in (AutoModelForCausalLM, AutoTokenizer))
    row = json.loads((toy / "eval.jsonl").read_text().splitlines()[0])
    prompt = torch.tensor([toy_prompt(tokenizer, row, "")])
    text = tokenizer.decode(model.generate(prompt, max_new_tokens=192, do_sample=False)[0, prompt.shape[1]:])
    assert model.dtype == torch.bfloat16 and text.rstrip().endswith(f"Answer: {row['answer']}<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id and tokenizer.chat_template

FEW = 300  # problems: more samples a rank than the engine takes at a time, so that they end bit by bit

def command(toy, out, *more):
    data = out.parent / "few.jsonl"
    data.write_text("".join((toy / "eval.jsonl").read_text().splitlines(keepends=True)[:FEW]))
    return [sys.executable, str(HERE / "eval.py"), "--model", str(toy / "model"), "--data", str(data),
            "--out", str(out), "--samples", "2", "--max-tokens", "60", "--temperature", "1", "--block", "8",
            *more]

def kill_rank(launcher, rank):
    """SIGKILL for the process of this rank under a torchrun."""
    for pid in subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True,
                              text=True).stdout.split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(int(pid), signal.SIGKILL)

def test_eval_end_to_end_killed_resumed_compared(toy, tmp_path, capsys):
    """Of two ranks one is killed; one rank goes on to the records of a run that was always on one."""
    base, whole, concise = (tmp_path / name for name in ("base", "whole", "concise"))
    problems = [json.loads(line) for line in (toy / "eval.jsonl").read_text().splitlines()[:FEW]]
    parts = [base / f"few.rank-{rank}.jsonl" for rank in (0, 1)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    killed = subprocess.Popen(launch + command(toy, base)[1:], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.time() + 120
    while not parts[1].is_file() and killed.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    kill_rank(killed, 1)
    assert killed.wait(timeout=60) != 0
    before = [line for part in parts if part.is_file() for line in part.read_text().split("\n")[:-1]]
    assert 8 <= len(before) < 2 * len(problems), "the kill came too late to test anything"
    assert not json.loads((base / "summary.json").read_text())["finished"]
    with open(parts[1], "a") as file:
        file.write('{"id": "half a li')
    evaluate = lambda words: subprocess.run(words, capture_output=True, text=True, timeout=180,
                                            env=ENVIRONMENT)
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(evaluate, (command(toy, base), command(toy, whole, "--block", "1000"),
                                        command(toy, concise, "--instruction", "v1"))):
            assert done.returncode == 0 and "| few" in done.stdout, done.stderr[-2000:]
            assert "\r" not in done.stdout + done.stderr  # bars are for those who watch
    file = base / "few.jsonl"
    assert file.read_bytes() == (whole / "few.jsonl").read_bytes() and not any(map(Path.exists, parts))
    assert json.loads((base / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())
    after = file.read_text().splitlines()
    assert set(before) < set(after)  # nothing was made twice
    records = [json.loads(line) for line in after]
    assert ([(r["id"], r["sample"]) for r in records]
            == [(str(p.get("id", i)), j) for i, p in enumerate(problems) for j in (0, 1)])
    assert len({r["seed"] for r in records}) == len(records)
    assert len({r["prompt_hash"] for r in records}) == len({p["problem"] for p in problems})
    for r, p in zip(records[::2], problems):
        assert r["gold"] == str(p["answer"]) and r["tokens"] == r["think_tokens"] + r["answer_tokens"] <= 60
        assert (r["finish_reason"] == "length") <= r["truncated"]
        assert r["correct"] == ev.grade(r["response"], r["gold"], r["finish_reason"] == "stop").correct
    summary = json.loads((base / "summary.json").read_text())
    assert summary["finished"]
    assert summary["benchmarks"]["few"] == json.loads(json.dumps(ev.summarise(records, 2)))
    other = [json.loads(line) for line in (concise / "few.jsonl").read_text().splitlines()]
    assert all(a["prompt_hash"] != b["prompt_hash"] and a["problem_hash"] == b["problem_hash"]
               for a, b in zip(records, other))
    ev.main(["compare", str(base), str(concise), "--plot", str(tmp_path / "x.png")])
    assert f"| {concise}" in capsys.readouterr().out and is_picture(tmp_path / "x.png")
    untouched = file.read_bytes(), (base / "summary.json").read_bytes()
    for more, message in ((["--temperature", "0.9"], "temperature: there 1.0, here 0.9"),
                          (["--instruction", "v2"], "instruction")):
        assert message in refusal(lambda: ev.main(command(toy, base, *more)[2:]), capsys)
        torch.distributed.destroy_process_group()
    assert untouched == (file.read_bytes(), (base / "summary.json").read_bytes())

def test_results_of_older_weights_are_not_taken_for_those_of_newer_ones(toy, tmp_path):
    """Train on, evaluate again into the same folder: the old records must not pass for the new model's."""
    shutil.copytree(toy / "model", tmp_path / "model")
    tokenizer, problems = AutoTokenizer.from_pretrained(toy / "model"), ev.load_problems(str(toy / "eval.jsonl"))
    jobs = {"eval": ev.make_jobs(tokenizer, problems, 2, 0)}
    settings = {"version": ev.VERSION, "weights": ev.fingerprint(tmp_path / "model"), "samples": 2}
    ev.replace_file(tmp_path / "out/summary.json", json.dumps({"settings": settings}))
    assert ev.done_before(tmp_path / "out", settings, jobs) == {"eval": []}
    (tmp_path / "model/model.safetensors").touch()
    settings = settings | {"weights": ev.fingerprint(tmp_path / "model")}
    with pytest.raises(ValueError, match="holds another run .weights: there"):
        ev.done_before(tmp_path / "out", settings, jobs)

EVAL_RANGES = {"samples": "0 -1", "max-tokens": "0", "temperature": "-1 nan 2.5", "top-p": "0 1.5 -1",
               "top-k": "-5", "seed": "-1 4294967296", "vllm-tp": "0", "block": "0", "k": "0 3 -1"}
BAD_EVALUATION = {
    "benchmark": (lambda d, good: dict(data="", benchmarks="math501"), "math501: expected math500, .*aime25"),
    "no data": (lambda d, good: dict(data=d / "no.jsonl"), "no.jsonl: .* No such file"),
    "empty": (lambda d, good: broken_data(d, ""), "rows.jsonl: expected each id once, found 0 rows"),
    "no answer": (lambda d, good: broken_data(d, '{"problem": "x"}\n'), "line 1: expected a field answer"),
    "list": (lambda d, good: broken_data(d, '{"problem": "x", "answer": ["2", "3"]}\n'),
             "line 1, field answer: exp"),
    "conversation": (lambda d, good: broken_data(d, json.dumps(dict(
                         prompt=turns("user", "assistant"), answer=1))),
                     "line 1, field prompt: expected the user's turn last"),
    "model": (lambda d, good: dict(model=d / "no"), "--model .*no: expected a folder with a chat model"),
    "template that raises": (bad_template, "chat template fails on .*: the system only"),
    "long responses": (lambda d, good: {"max-tokens": 100000},
                       "prompt of problem 39 .*lower --max-tokens from 100000"),
    "long problem": (lambda d, good: broken_data(d, json.dumps(dict(
                         problem="x " * 3000, answer=1, id="huge"))),
                     "prompt of problem huge has .* tokens.*leave that problem out"),
    "instruction": (lambda d, good: dict(instruction="@nofile"), "--instruction @nofile.* No such file"),
    "one word": (lambda d, good: dict(instruction="short"), "--instruction short: expected v1"),
    "no text": (lambda d, good: dict(instruction=""), "--instruction : expected v1"),
    "tp": (lambda d, good: {"vllm-tp": 2}, "--vllm_tp 2: expected a number of ranks that it divides"),
} | {f"{name} {value}": (lambda d, good, change={name: value}: change,
                         f"--{name} {value}.*: expected at least ")
     for name, values in EVAL_RANGES.items() for value in values.split()}

def evaluation(good, out, **change):
    settings = dict(model=good["model"], data=good["data"], out=out, samples=2) | {"max-tokens": 60} | change
    return ["--" + word if at == 0 else str(word)
            for pair in settings.items() for at, word in enumerate(pair)]

@pytest.mark.parametrize("case", BAD_EVALUATION)
def test_bad_evaluation_is_refused_before_the_engine_starts(case, good, no_group, tmp_path, capsys):
    change, message = BAD_EVALUATION[case]
    words = evaluation(good, tmp_path / "out", **change(tmp_path, good))
    assert re.search(message, refusal(lambda: ev.main(words), capsys))
    assert not (tmp_path / "out").exists()

def test_an_evaluation_keeps_its_folder_and_its_date(good, one_rank, tmp_path, capsys):
    out, model = tmp_path / "out", bad_template(tmp_path, good, DATED)["model"]
    prepare = lambda **change: ev.prepare(ev.parse_args(
        evaluation(good, out, **dict(model=model) | change))[0])
    settings = prepare()[2]
    ev.write_summary(out, settings | dict(date="2024-07-26"), {}, finished=False)
    tokenizer, jobs, again, *_ = prepare(model=f"{model}/")
    assert again == settings | dict(date="2024-07-26")
    assert "26 Jul 2024" in tokenizer.decode(jobs["rows"][0]["prompt"])
    for change in (dict(temperature=0.9), dict(instruction="v2"), dict(wrapper="none")):
        with pytest.raises(ValueError, match=f"holds another run .{min(change)}: there"):
            prepare(**change)
    (out / "summary.json").unlink()
    (out / "rows.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="no summary.json"):
        prepare()
    for words, message in (("--samples many", "invalid int value"), ("--sampels 2", "--sampels"),
                           ("stray", "stray")):
        with pytest.raises(SystemExit, match=f"eval.py: .*{message}"):
            ev.main(["--model", "m", *words.split()])

def test_records_read_think_blocks_opened_by_the_template(toy):
    """Several samples, one seed each; what an engine would sample is given by hand."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    problems = [{"id": "p", "problem": "a1 b3", "answer": "4", "level": None}]

    def records(*answers):
        jobs = ev.make_jobs(tokenizer, problems, samples=4, seed=5)
        assert len({job["seed"] for job in jobs}) == 4
        assert all(job["prompt"] == jobs[0]["prompt"] for job in jobs)
        outputs = [(encode(text) + [tokenizer.eos_token_id], None, True) for text in answers]
        return ev.make_records(tokenizer, jobs, outputs)
    answers = ["<think> 3 </think>\nAnswer: 4", "<think> Answer: 4", "Answer: 4",
               "<think> 3 </think>\nAnswer: 5"]
    plain = records(*answers)
    assert [r["correct"] for r in plain] == [True, False, True, False]
    assert [r["truncated"] for r in plain] == [False, True, False, False]
    assert [r["think_tokens"] for r in plain] == [
        len(encode(text)) for text in ("<think> 3 </think>", answers[1] + " 7", "", "<think> 3 </think>")]
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    opened = records("3 </think>\nAnswer: 4", "Answer: 4", "4", "<think> </think>\nAnswer: 4")
    assert [r["correct"] for r in opened] == [True, False, False, True]
    assert [r["truncated"] for r in opened] == [False, True, True, False]
    assert [r["seed"] for r in plain] == [r["seed"] for r in opened]
    assert ev.summarise(opened)["accuracy"] == 0.5

# ------------------------------------------------------------------------------------------------------ bench
# The objective at the shapes of a 0.6B Qwen3's head, on one thread, a fresh process for each row.

VOCABULARY, HIDDEN = 151936, 1024

def bench_inputs(N, dtype, device="cpu", V=VOCABULARY, d=HIDDEN):
    """Logits with a standard deviation of 3.2, and a teacher at a KL of about 0.0017 nats/token from the
    student."""
    torch.manual_seed(0)
    new = dict(dtype=dtype, device=device)
    hs, head = torch.empty(N, d, **new).normal_(), torch.empty(V, d, **new).normal_(std=3.2 / d**0.5)
    ht = (hs.float() + 0.018 * torch.randn(N, d, device=device)).to(dtype)
    weights = torch.full((N,), 1 / N, device=device)
    return hs.requires_grad_(), head.requires_grad_(), ht, head.detach(), weights

def naive_loss(hs, ws, ht, wt, weights):
    """What one writes first: logits of all tokens in the inputs' dtype, autograd for the rest. (bfloat16
    products are taken in float32 and rounded, as a GPU does; a CPU's own bfloat16 kernels take minutes.)"""
    logits = lambda h, w: h @ w.T if h.is_cuda else (h.float() @ w.float().T).to(h.dtype)
    log_p, log_q = logits(hs, ws).log_softmax(-1), logits(ht, wt).log_softmax(-1)
    return (weights * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()

def four_matmuls(hs, ws, ht, wt, weights, chunk=256):
    """The arithmetic that cannot be avoided, into buffers made once: both logits and both gradients."""
    logits, gh, gw = hs.new_empty(chunk, len(ws)), torch.empty_like(hs[:chunk]), torch.zeros_like(ws)
    with torch.no_grad():
        for i in range(0, len(hs), chunk):
            torch.mm(ht[i:i + chunk], wt.T, out=logits)
            torch.mm(hs[i:i + chunk], ws.T, out=logits)
            torch.mm(logits, ws, out=gh)
            gw.addmm_(logits.T, hs[i:i + chunk])

def exact_in_chunks(hs, ws, ht, wt, weights):
    """KL and the head's gradient in float64, 64 tokens at a time."""
    ws64, wt64, kl, grad = (ws.detach().double(), wt.double(), 0.0,
                            torch.zeros_like(ws, dtype=torch.float64))
    for i in range(0, len(hs), 64):
        h = hs[i:i + 64].detach().double()
        log_p, log_q = (h @ ws64.T).log_softmax(-1), (ht[i:i + 64].double() @ wt64.T).log_softmax(-1)
        value = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
        grad.addmm_((log_p.exp() * (log_p - log_q - value) * weights[i:i + 64, None].double()).T, h)
        kl += (weights[i:i + 64].double() * value[:, 0]).sum().item()
    return kl, grad

def bench_row(method, N, dtype):
    """Worker: one row's figures as JSON."""
    torch.set_num_threads(1)
    inputs = bench_inputs(int(N), getattr(torch, dtype))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, start = peak(), time.process_time()
    if method == "four_matmuls":
        four_matmuls(*inputs)
    else:
        loss = naive_loss(*inputs) if method == "naive" else opsdc.distill_loss(*inputs)[0]
        loss.backward()
    found = dict(seconds=time.process_time() - start, mib=peak() - before)
    if dtype == "bfloat16":
        kl, grad = exact_in_chunks(*inputs)
        found |= dict(kl=kl, loss_error=abs(loss.item() / kl - 1),
                      grad_error=relative_error(inputs[1].grad, grad))
    print(json.dumps(found))

def bench():
    print(f"V={VOCABULARY}, d={HIDDEN}, one thread, torch {torch.__version__}; MiB above the inputs (head's "
          f"gradient: {VOCABULARY * HIDDEN * 4 / 2**20:.0f} in float32)\n\n"
          "| | N | CPU s | x four matmuls | peak MiB | loss error | head gradient error |\n"
          "|---|---|---|---|---|---|---|")
    row = lambda *words: json.loads(succeed("bench_row", *words, script="test_opsdc.py",
                                            timeout=1800).splitlines()[-1])
    for N in (1024, 2048):
        floor = row("four_matmuls", N, "float32")["seconds"]
        print(f"| four bare matmuls | {N} | {floor:.1f} | 1 | | | |")
        for method, name in (("opsdc", "`distill_loss`"), ("naive", "naive autograd")):
            found = row(method, N, "float32")
            print(f"| {name}, float32 | {N} | {found['seconds']:.1f} | {found['seconds'] / floor:.2f} | "
                  f"{found['mib']:.0f} | | |", flush=True)
    for method, name in (("opsdc", "`distill_loss`"), ("naive", "naive autograd")):
        found = row(method, 1024, "bfloat16")
        print(f"| {name}, bfloat16, KL {found['kl']:.4f} | 1024 | {found['seconds']:.1f} | | "
              f"{found['mib']:.0f} | {found['loss_error']:.4%} | {found['grad_error']:.2%} |", flush=True)

# -------------------------------------------------------------------------------------------------------- gpu
# `gpu` prints one table of what only a GPU can tell, a process a part; a part that fails is a row that says
# so. Each part runs on a CPU too, at other sizes (the test below).

def objective_rows(N, V, d):
    """Worker: ms and GiB of four bfloat16 products, naive autograd and distill_loss, with their errors at a
    KL of 0.0017."""
    device, N = ("cuda" if torch.cuda.is_available() else "cpu"), int(N)
    inputs = bench_inputs(N, torch.bfloat16, device, int(V), int(d))
    exact, grad = exact_in_chunks(*inputs)
    chunk, rows = min(N, opsdc.Config().loss_chunk), {}
    for name, loss in dict(four=lambda: four_matmuls(*inputs, chunk=chunk), naive=lambda: naive_loss(*inputs),
                           distill_loss=lambda: opsdc.distill_loss(*inputs, chunk=chunk)[0]).items():
        seconds, before = [], torch.cuda.memory_allocated()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):  # the first is not counted: kernels are chosen and memory is asked for
            inputs[0].grad = inputs[1].grad = None
            start, value = time.perf_counter(), loss()
            if value is not None:
                value.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        ms = 1000 * min(seconds[1:])
        four = ms if name == "four" else four
        rows[name] = f"{ms:.1f} ms, {ms / four:.2f} x four, {gib:.1f} GiB"
        if value is not None:
            rows[name] += (f", loss off by {abs(value.item() / exact - 1):.1e}, head's gradient by "
                           f"{relative_error(inputs[1].grad, grad):.2%}")
    print(json.dumps(rows))

def training_side(model_path, tokens, checkpointing):
    """Worker: seconds and memory of the trainer alone, in three steps on four random responses a rank of so
    many tokens; the first step is not counted."""
    device, opsdc.MAX_GAP = opsdc.start_processes(), math.inf  # no engine to agree with
    cfg = opsdc.Config(model=model_path, gradient_checkpointing=checkpointing == "on")
    tokenizer, world = AutoTokenizer.from_pretrained(model_path), torch.distributed.get_world_size()
    problems, _ = fixed_batch(tokenizer)
    ids = torch.randint(5, len(tokenizer), (4 * world, int(tokens))).tolist()
    rollouts = [opsdc.Rollout(0, y, [-1.0] * len(y), True) for y in ids]
    model = opsdc.load_model(cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    thetabar, steps = opsdc.snapshot(model), []
    for _ in range(3):
        steps.append({})
        opsdc.train_step(model, thetabar, optimizer, rollouts, problems, device, steps[-1], cfg)
    peak = opsdc.peak_memory(types.SimpleNamespace(asleep=0))
    if torch.distributed.get_rank() == 0:
        teacher, student = (statistics.fmean(step[f"seconds_{x}"] for step in steps[1:])
                            for x in ("teacher", "student"))
        print(json.dumps({f"recomputation {checkpointing}": (
            f"{4 * world} x {tokens} tokens: teacher {teacher:.2f} s, student {student:.2f} s, peak "
            f"{peak:.1f} GiB, loss {steps[-1]['loss']:.6f}")}))

def sync_rows(model, directory):
    """What the worker `sync`, above, finds on one GPU: gaps in nats/token, the largest of its tokens."""
    succeed("sync", model, directory / "found.json", 1, ranks=1, script="test_opsdc.py")
    (*_, fresh), (*_, sharp), stopped, (*_, stale), (*_, again), counts = json.loads(
        (directory / "found.json").read_text())
    gaps = f"{fresh:.1e}, at temperature 0.05 {sharp:.1e}, stale {stale:.1e}, after a sync {again:.1e}"
    return {"largest gap": gaps, "stale weights": stopped, "sleep frees": f"{counts[2]:.1f} GiB"}

def run_rows(model, data, out, ranks, **settings):
    """Three steps of opsdc.py, with process groups that take a minute to destroy; then one that fails."""
    arguments = small_run(model, data, out, steps=3, batch_size=4 * ranks, lr=1e-5, save_every=3, **settings)
    done, seconds = seconds_to_leave("export", out.parent, arguments, ranks)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = {}
    for m in metrics_of(out):
        seconds_of = {key.removeprefix("seconds_"): m[key] for key in m if key.startswith("seconds_")}
        rows[f"step {m['step']}"] = (
            ", ".join(f"{name} {x:.2f} s" for name, x in seconds_of.items())
            + f", {m['tokens_per_second']:.0f} tokens/s, gap {m['logprob_gap']:.1e} (largest "
            f"{m['logprob_gap_max']:.1e}), peak {m['peak_memory_gib']:.1f} GiB")
    rows["normal end"] = f"{seconds:.1f} s after the export began"
    if ranks > 1:
        arguments[arguments.index(out)] = out.with_name("failing")
        done, seconds = seconds_to_leave("teacher_pass", out.parent, arguments, ranks)
        assert done.returncode and "this rank fails" in done.stdout, done.stdout[-3000:]
        rows["one rank fails"] = f"all gone after {seconds:.1f} s"
    return rows

def gpu_table(directory, ranks, shape, tokens, **settings):
    """Prints the table; returns the parts that failed. shape: (N, V, d) of the objective."""
    model, data, failed = directory / "model", directory / "rows.jsonl", []
    worker = lambda *words, ranks=0: json.loads(
        succeed(*words, ranks=ranks, script="test_opsdc.py", timeout=200).splitlines()[-1])
    parts = {"objective": lambda: worker("objective_rows", *shape)}
    for switch in ("on", "off"):
        parts[f"trainer alone, {switch}"] = lambda switch=switch: worker(
            "training_side", model, tokens, switch, ranks=ranks)
    if importlib.util.find_spec("vllm"):
        parts["engine and trainer"] = lambda: run_rows(model, data, directory / "run", ranks, **settings)
        parts["weight sync"] = lambda: sync_rows(model, directory)
    print("| part | measured | |\n|---|---|---|")
    for part, measured in parts.items():
        try:
            rows = measured()
        except Exception as error:
            failed.append(part)
            rows = {"FAILED": re.sub(r"[\s|]+", " ", str(error))[-600:]}
        print("".join(f"| {part} | {name} | {value} |\n" for name, value in rows.items()), end="", flush=True)
    return failed

def gpu(directory="out-gpu"):
    """All of it at the shapes of Qwen3-0.6B, with random weights, on every GPU of this machine."""
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU: nothing was measured")
    directory, ranks = Path(directory), torch.cuda.device_count()
    print(f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n",
          flush=True)
    large(directory)
    failed = gpu_table(directory, ranks, (4096, VOCABULARY, HIDDEN), 2048, max_response_tokens=1024)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")

def recomputation(directory="out-recomputation"):
    """--gradient_checkpointing on and off: the trainer alone, a random Llama of SmolLM-135M's shape."""
    model = make_model(Path(directory) / "model", "llama", vocab_size=49152, hidden_size=576,
                       intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                       num_key_value_heads=3, head_dim=64, initializer_range=0.02)
    for switch in ("on", "off", "on", "off"):
        done = succeed("training_side", model, 256, switch, script="test_opsdc.py", timeout=3000)
        print(done.splitlines()[-1], flush=True)

def test_parts_of_the_gpu_command(whole_run, tmp_path, capsys):
    """On a CPU all but the engine's, whose workers other tests here run; on a GPU the command."""
    if torch.cuda.is_available():
        return gpu(tmp_path)
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu(tmp_path)
    shutil.copytree(whole_run[0], tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert gpu_table(tmp_path, 1, (64, 400, 32), 16) == []
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 3 + 2 and table.count("head's gradient by 0.1") == 1

# ---------------------------------------------------------------------------------------------------- profile

def large(directory="out-large"):
    """A random Qwen3 of the 0.6B's shape and 40 problems, to profile; vocabulary beyond its tokenizer's."""
    make_model(Path(directory) / "model", "qwen3", vocab_size=151936, hidden_size=1024,
               intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
               head_dim=128, initializer_range=0.02)
    write_rows(Path(directory) / "rows.jsonl")

def profile(*arguments):
    """opsdc.py with `arguments`, then where its seconds went; teacher_pass holds copy_into."""
    calls = {}

    def timed(owner, name):
        function = getattr(owner, name)

        def timer(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                calls.setdefault(name, []).append(time.perf_counter() - start)
        setattr(owner, name, timer)
    names = ("sample_rollouts", "make_micro_batches", "teacher_pass", "copy_into",
             "student_pass", "update", "refresh", "log_step", "peak_memory", "save_checkpoint", "export",
             "load_model", "prepare")
    for owner, name in ((opsdc.RolloutEngine, "__init__"), (opsdc.RolloutEngine, "sync"),
                        (ev, "grade_rollouts"), *((opsdc, name) for name in names)):
        timed(owner, name)
    sys.argv, start = ["opsdc.py", *arguments], time.perf_counter()
    opsdc.main()
    print(f"in all {time.perf_counter() - start:.1f} s\n\n| | calls | seconds | of the first | of a later |\n"
          "|---|---|---|---|---|")
    for name, seconds in sorted(calls.items(), key=lambda item: -sum(item[1])):
        print(f"| {name} | {len(seconds)} | {sum(seconds):.2f} | {seconds[0]:.3f} | "
              + (f"{statistics.fmean(seconds[1:]):.3f} |" if seconds[1:] else "|"))

if __name__ == "__main__":
    commands = dict(toy=make_toy) | {command.__name__: command for command in (
        quickstart, claims, traced, picture, families, fork, drill, large, profile, bench, bench_row,
        gradients, sync, nan, die, leave, recomputation, gpu, objective_rows, training_side)}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
