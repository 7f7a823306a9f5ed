"""Tests of OPSDC, the toy that they run on, and the commands around both. Nothing is downloaded.

Real are the engine (vLLM), the sharding (FSDP2, with gloo where there is no GPU), torchrun, the signals, the
files, and a stand-in for the hub that answers over HTTP. What is compared is compared with float64 or with a
second real run. Patched is only what is not there or must not happen:

    torch.cuda in `memory` and in two tests, and the engine in one of these, which records the order of calls
    vLLM's question whether this is a CPU, so that weights are reloaded as on a GPU
    an addmm with an out_dtype, which CPUs lack; a flock that fails; packages that are not installed; wandb
    the free space of a disk that is full; rmtree where an export is interrupted
    from_pretrained, RolloutEngine and input where a check has to refuse before them
    functions in which a rank is to fail, be killed or be late (inject)

CONTENTS
    0. Imports and processes: how scripts and functions of this file are started
    1. The toy: a tiny model that overthinks, its problems, what is wrong in a wrong answer
    2. Small models, rows and runs: what tests are made of, with all families of models
    3. Tests of opsdc.py, in the order of its sections
    4. Tests of eval.py, likewise
    5. The commands below that are more than tests, each with its tests
    6. Main

    python -m pytest -n 2 --dist worksteal test_opsdc.py      all tests, two at a time (pytest-xdist)
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
    python test_opsdc.py gpu [DIR]                  what only a GPU can tell, in one table
    python test_opsdc.py memory OPTIONS             GB a GPU of opsdc.py with them (--gpus, --nodes)
"""
import argparse
import cProfile
import collections
import contextlib
import copy
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pstats
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import types
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer,
                          GenerationConfig, HfArgumentParser, LlamaConfig,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for GPUs leaves them to forks
environment_before = dict(os.environ)
import eval as ev  # noqa: E402
import opsdc  # noqa: E402
SIDE_EFFECTS = ("vllm" in sys.modules, torch.distributed.is_initialized(),
                environment_before != os.environ)
HERE = Path(__file__).resolve().parent
MATH500, AIME = (HERE.parent / f"shared/data/{name}.jsonl" for name in ("math500", "aime25"))
CASES = HERE.parent / "shared/cases/grading.jsonl"

# For all child processes: copied before any test changes os.environ. PYTHONPATH lets a script in another
# folder import eval.py.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
HANG = 3000  # seconds; only a hang takes as long: ten times what a slow, quiet machine needs

# ---------------------------------------------------------------------------------------------- 0. PROCESSES
# launch() runs a script or a function of this file in forks of a server that has imported vLLM once, with the
# settings that opsdc.py makes before. The server never uses a GPU, which its forks could not use then, and a
# fork has nothing of the test's process but its arguments.
SERVER = multiprocessing.get_context("forkserver")
BEFORE_VLLM = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1",
                   TORCHDYNAMO_DISABLE="1")

def fork_process(function, log, *arguments, **environment):
    """A new fork that calls function(*arguments), its output added to `log`."""
    SERVER.set_forkserver_preload(["test_opsdc", "vllm.entrypoints.llm", "vllm.v1.worker.gpu_model_runner"])
    with mock.patch.dict(os.environ, ENVIRONMENT | BEFORE_VLLM):
        multiprocessing.forkserver.ensure_running()
    environment = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
    process = SERVER.Process(target=call, daemon=True,
                             args=(function, arguments, log, environment, os.getcwd()))
    process.start()
    return process

def call(function, arguments, log, environment, directory):
    """In the fork."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    gc.freeze()  # vLLM collects garbage five times a start: not among what is imported
    function(*arguments)

def status_of(process):
    process.join(HANG)
    assert process.exitcode is not None, "a fork hangs"
    return process.exitcode

def run_script(file, *arguments):
    """`python FILE ARGUMENTS`, in this process."""
    del sys.modules["opsdc"], sys.modules["eval"]
    sys.argv = [str(HERE / file), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

def launch(what, *arguments, ranks=1, fails=False, torchrun=False, **environment):
    """What a script or a function of this file says in `ranks` forks with the group that torchrun makes; with
    torchrun=True in processes that torchrun has started. Its status has to be 0; with fails=True any other;
    with fails=-9 this one, as of a fork that is killed."""
    if ranks > torch.cuda.device_count() > 0:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    arguments = [*map(str, arguments)]
    with tempfile.NamedTemporaryFile() as log:
        if torchrun:
            words = [str(HERE / "test_opsdc.py"), what.__name__] if callable(what) else [str(HERE / what)]
            environment = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
            status = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node",
                                     str(ranks), *words, *arguments],
                                    stdout=log, stderr=log, env=environment, timeout=HANG).returncode
            fails = fails != 0  # torchrun ends with 1, whatever ended its ranks
        else:
            if not callable(what):
                what, arguments = run_script, [what, *arguments]
            group = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1",
                         MASTER_PORT=free_port(), TORCHELASTIC_USE_AGENT_STORE=False)
            processes = [fork_process(what, log.name, *arguments, **group, RANK=rank, LOCAL_RANK=rank,
                                      **environment)
                         for rank in range(ranks)]
            status = max(map(status_of, processes), key=abs)
        said = Path(log.name).read_text()
    assert status != 0 if fails is True else status == fails, said[-5000:]
    return said

def inject(owner, name, when, what):
    """From now on owner.name first calls what(*arguments) at each call whose number, from 1, makes
    when(number) true."""
    whole, numbers = getattr(owner, name), itertools.count(1)

    def wrapper(*arguments, **options):
        if when(next(numbers)):
            what(*arguments)
        return whole(*arguments, **options)
    setattr(owner, name, wrapper)

def shared(folder, name, make):
    """The folder of this name for the tests of all of xdist's workers, made by the first that asks for it.
    folder: a test's own."""
    session = folder.parent.parent if folder.parent.name.startswith("popen-gw") else folder.parent
    folder = session / name
    with open(folder.with_suffix(".lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            make(folder)
            lock.write("made")
    return folder

def metrics_of(out):
    """The rows of a training run's metrics.jsonl."""
    return ev.read_lines(Path(out) / "metrics.jsonl")

@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the other cores are busy, and threads of torch spin while they wait

# ------------------------------------------------------------------------------------------------- 1. THE TOY
# A tiny Qwen3, trained from scratch on the spot, that overthinks until told not to. A problem is a sum
# modulo 10 of k = 3..6 labelled digits; the model writes one line a term, sometimes a wrong one, checks most
# lines up to three times, and goes on from what the last line says:
#
#     Add modulo 10: d3 c8 b5 a2  ->  <think>\n0 + d3 = 4\ncheck 0 + d3 = 3\n3 + c8 = 1\n...\nAnswer: 8
#
# toy_response() writes such answers at random by the table RATES, make_toy() trains the model on them, and
# fault() names what is wrong in a wrong one.
QWEN_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n"
                 "{% if enable_thinking is defined and not enable_thinking %}"
                 "<think>\n\n</think>\n\n{% endif %}{% endif %}")
LETTERS = "abcdef"     # labels count down to a: the model knows its last term without looking for the next
LEVELS = (3, 4, 5, 6)  # k, the number of terms; k = 2 has only 100 different problems
CHECKS = ("check", "recheck", "recount")  # of a step, in this order: words apart, so that none is counted

# BUILT IN, as probabilities. Steps slip at the terms d, e and f that only longer sums have, whatever the
# prompt says. A step's first check never does, and the thought goes on from it: it pays on long sums and
# hardly on short ones. A further check may go astray: beyond what a sum needs, every line is a chance to go
# wrong. Without an instruction all sums are overthought alike; v1 drops nearly all checks, v2 most first ones
# of short sums and few of long ones: a teacher that knows where brevity is cheap is an INPUT. Open, for an
# experiment to answer, is what of it a student takes over that never sees an instruction.
RATES = {  # terms:    3      4      5      6
    "check":       (0.950, 0.950, 0.950, 0.950),  # after a step, in the student's prompt
    "again":       (0.850, 0.850, 0.850, 0.850),  # after a check, at most twice
    "check, v1":   (0.020, 0.030, 0.050, 0.080),
    "again, v1":   (0.020, 0.020, 0.020, 0.020),
    "check, v2":   (0.300, 0.600, 0.750, 0.850),
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
    texts = [opsdc.STUDENT_PREFIX, opsdc.FORMAT, opsdc.SUFFIX, *TOLD.values(),
             "Add modulo 10: = +\nuser\nassistant\nAnswer:\n" + "\n".join(CHECKS)]
    texts += [f"{digit} {digit}" + "".join(f" {letter}{digit}" for letter in LETTERS) for digit in range(10)]
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    words = special + sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = split, decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens(["<think>", "</think>"])  # not special: the grader must see them
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>",
                                   unk_token="<unk>", model_max_length=512, chat_template=QWEN_TEMPLATE,
                                   clean_up_tokenization_spaces=False)

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
    """kind: "" for the student's prompt, a name in TOLD for the teacher's, "bare" without a wrapper."""
    return opsdc.prompt_ids(tokenizer, row["problem"], TOLD.get(kind),
                            wrapper="none" if kind == "bare" else "math")

def toy_response(rng, row, kind, astray, verbose=0):
    """Returns (lines, slips) of an answer. Its first `verbose` lines follow the rates of the base without an
    instruction. The slips, places in lines of wrong steps, come at the same rates with an instruction."""
    total, lines, slips = 0, ["<think>"], set()
    bare = kind if kind == "bare" else ""

    def off(p):  # by 1 to 9, with probability p
        return rng.randrange(1, 10) * (rng.random() < p)
    for term in row["problem"].split()[3:]:
        question, right = f"{total} + {term}", (total + int(term[1])) % 10
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
    def line(a, b):
        return f"{a} + {rng.choice(LETTERS)}{b} = {(a + b) % 10}\n"
    texts = ["".join(line(rng.randrange(10), rng.randrange(10)) for _ in range(4)) for _ in range(64)]
    ids = torch.tensor([tokenizer.encode(text) for text in texts])
    return ids, ids[:, 1:].masked_fill(ids[:, :-1] != tokenizer.convert_tokens_to_ids(" ="), -100)

def special_ids(tokenizer):
    return dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)

def toy_model(tokenizer):
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,  # 16 has no CPU kernel in vLLM
        max_position_embeddings=512, tie_word_embeddings=True, dtype="float32",
        **special_ids(tokenizer)))
    for module in model.modules():  # std 0.02 is for wide models: here its loss is 8 times higher at step 800
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.1)
    torch.nn.init.constant_(model.model.norm.weight, 3.0)  # sharp: temperature 1 draws from the tail
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **special_ids(tokenizer))
    return model

def make_toy(directory="toy", seed=0, astray=RATES["astray"][0], steps=(200, 350, 670), batch_size=16,
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
    """Samples an answer to each row -> {(event, column): rate as in RATES, of probabilities, not of draws};
    {level: "right" or the fault of each answer}. Prompts of a level are of one length: no padding."""
    rates, ends = collections.defaultdict(list), {}
    newline, *words = tokenizer.convert_tokens_to_ids(["\n", *CHECKS])
    for level in LEVELS:
        part = [row for row in rows if row["level"] == level]
        prompts = torch.tensor([toy_prompt(tokenizer, row, kind) for row in part])
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=192)
        responses, logits = ids[:, prompts.shape[1]:], model(ids).logits[:, prompts.shape[1]:]
        texts = [text.partition(tokenizer.eos_token)[0] for text in tokenizer.batch_decode(responses)]
        verdicts = ev.grade_all(texts, [row["answer"] for row in part])
        ends[level] = ["right" if verdict.correct else fault(text, row["problem"])
                       for verdict, text, row in zip(verdicts, texts, part)]
        for sequence, p in zip(responses.tolist(), logits.softmax(-1)):
            before = None  # what the line before came to
            for end in [at for at in range(6, len(sequence)) if sequence[at] == newline]:
                line = LINE.search(tokenizer.decode(sequence[end - 7:end]))  # 6 or 7 tokens
                if not line:
                    continue  # not of the thought
                checks = 1 + CHECKS.index(line[1]) if line[1] else 0  # of this step so far
                result = before if checks > 1 else (int(line[2]) + int(line[4])) % 10
                digit, before = tokenizer.convert_tokens_to_ids(f" {result}"), int(line[0][-1])
                number = max(LEVELS[0], 1 + LETTERS.index(line[3]))
                event = (("wrong", number), ("wrong check", level), ("astray", level))[min(checks, 2)]
                rates[event].append(1 - p[end - 2, digit].item())
                if checks < len(CHECKS):
                    rates["again" if checks else "check", level].append(p[end, words[checks]].item())
    return {event: statistics.fmean(values) for event, values in rates.items()}, ends

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

def toy_of(folder):
    return shared(folder, "a-toy", make_toy)

@pytest.fixture
def toy(tmp_path):
    return toy_of(tmp_path)

def test_the_toy_does_what_its_table_says(toy):
    """Rates under each prompt, by level, beside RATES. So short a training leaves checks off by up to 0.09,
    other rates by a factor of 2.5 (seven toys: seeds 0 to 2 on several kinds of kernels): twice that is
    allowed. And both kinds of checks matter."""
    model = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    rows, ends = ev.read_lines(toy / "eval.jsonl"), {}
    torch.manual_seed(0)
    for kind in ("", *TOLD):
        rates, ends[kind] = toy_rates(model, tokenizer, rows, kind)
        print(kind, {event: round(value, 3) for event, value in rates.items()})
        for (event, column), value in rates.items():
            if event in ("check", "again"):
                assert value == pytest.approx(rate(event, kind, column), abs=0.2), (kind, event, column)
            elif (event, kind) == ("astray", "") or event == "wrong" and column > 3:
                assert 1 / 5 < value / rate(event, "", column) < 5, (kind, event, column)
        rare = [rates["wrong", 3]] + [rates["wrong check", level] for level in LEVELS if not kind]
        assert max(rare) < rates["wrong", 6] / 2, kind

    def share(end, kind, *levels):
        return statistics.fmean(x == end for level in levels for x in ends[kind][level])
    assert share("right", "v2", *LEVELS) > share("right", "", *LEVELS) + 0.05  # further checks do harm
    assert share(FAULTS[0], "v1", 5, 6) > share(FAULTS[0], "v2", 5, 6)  # first ones mend slips of long sums

@pytest.mark.parametrize("lines, expected", [
    (["0 + b8 = 9", "9 + a5 = 4"], "a slip unchecked"),
    (["0 + b8 = 8", "check 0 + b8 = 8", "recheck 0 + b8 = 7", "7 + a5 = 2"], "a further check astray"),
    (["0 + b8 = 8", "check 0 + b8 = 8"], "a term left out"),
    (["0 + b8 = 8", "8 + a5 = 3", "3 + a5 = 8"], "a term again"),
    (["0 + b8 = 8", "8 + a6 = 4"], "other terms"),
    (["0 + b8 = 8", "check 0 + b8 = 7", "7 + a5 = 2"], "else")], ids=FAULTS)

def test_faults_of_wrong_answers_to_the_toys_problems(lines, expected):
    assert fault("\n".join(["<think>", *lines, "</think>"]), "Add modulo 10: b8 a5") == expected

# README's quick start: chosen on validation.jsonl of the toy; eval.jsonl is reported
TOY_RUN = ("--instruction v2 --steps 60 --lr 1e-4 --refresh_every 0 --max_prompt_tokens 256 "
           "--max_response_tokens 192").split()
TOY_EVAL = "--samples 2 --max-tokens 192 --temperature 1 --top-p 1 --top-k 0".split()

def test_toy_learns_to_be_brief_without_being_told(toy, tmp_path):
    """The paper's claim, end to end, by the README's training on two ranks: about half the tokens, and better
    answers, told nothing. Its metrics, its samples, and that its model is a plain Hugging Face one."""
    out, summaries = tmp_path / "out", []
    launch("opsdc.py", *TOY_RUN, "--model", toy / "model", "--data", toy / "train.jsonl", "--out", out,
           ranks=2)
    for name, model in dict(before=toy / "model", after=out / "model").items():
        launch("eval.py", "--model", model, "--data", toy / "eval.jsonl", "--out", tmp_path / name, *TOY_EVAL,
               ranks=2)
        summaries.append(ev.read_summary(tmp_path / name)["benchmarks"]["eval"])
    base, ours = summaries
    print(f"tokens {base['tokens']:.1f} -> {ours['tokens']:.1f}, "
          f"accuracy {base['accuracy']:.1%} -> {ours['accuracy']:.1%}")
    assert base["problems"] >= 300 and ours["tokens"] <= 0.6 * base["tokens"]
    assert ours["accuracy"] >= base["accuracy"] + 0.05

    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [line["teacher_age"] for line in lines] == list(range(60))  # frozen
    assert lines[0]["loss"] > 5 * lines[59]["loss"]
    known = ["loss", "grad_norm", "lr", "response_tokens", "response_tokens_min", "response_tokens_max",
             "truncated", "accuracy", "student_entropy", "teacher_entropy", "logprob_gap",
             "seconds_generate", "seconds_step", "tokens_per_second"]
    for line in lines:
        assert line["skipped_updates"] == 0 and None not in [line[name] for name in known]
        assert line["logprob_gap_max"] < 1e-4 or opsdc.DTYPE != torch.float32
    samples = ev.read_lines(out / "samples.jsonl")
    assert len(samples) == 240 and "</think>\nAnswer: " in samples[-1]["response"] and samples[-1]["finished"]

    model, tokenizer = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    row = ev.read_lines(toy / "eval.jsonl")[0]
    prompt = torch.tensor([toy_prompt(tokenizer, row, "")])
    text = tokenizer.decode(model.generate(prompt, max_new_tokens=192, do_sample=False)[0, prompt.shape[1]:])
    assert model.dtype == torch.bfloat16 and text.rstrip().endswith(f"Answer: {row['answer']}<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id and tokenizer.chat_template

# ----------------------------------------------------------------------------- 2. SMALL MODELS, ROWS AND RUNS

# Models: a tied Qwen3 and an untied Llama, whose template opens <think> as R1-Distill's does, are enough for
# most tests. The others are those of `python test_opsdc.py families`.
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
    "InternVL": ("internvl", dict(text_config=dict(model_type="qwen2"), vision_config=VISION | dict(
        image_size=[28, 28], patch_size=[14, 14]))),
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
USUAL = {"qwen3": ("qwen3", TIED | dict(initializer_range=0.1)),
         "llama": ("llama", dict(initializer_range=0.1))}
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False)

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

def make_model(directory, name="qwen3", texts=tuple(opsdc.INSTRUCTIONS.values()), vocabulary=400, seed=0,
               **shape):
    """A random model with its tokenizer in `directory`: "qwen3", "llama" or a name of FAMILIES. Noise is
    added to all weights of a family, so that a norm, a bias or a sink that is forgotten shows."""
    torch.manual_seed(seed)
    kind, changes = (USUAL | FAMILIES | REFUSED)[name]
    tokenizer = make_tokenizer(texts, R1_TEMPLATE if name == "llama" else QWEN_TEMPLATE, vocabulary)
    special = special_ids(tokenizer)
    shape_of_all = SHAPE | special | dict(vocab_size=len(tokenizer))
    if "text_config" in changes:
        text = shape_of_all | changes["text_config"]
        config = AutoConfig.for_model(kind, **special, **changes | dict(
            text_config=text, tie_word_embeddings=text["tie_word_embeddings"]))
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape_of_all | changes | shape))
    if name not in USUAL:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file = Path(directory) / "generation_config.json"  # with a temperature, which save_pretrained refuses
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(temperature=0.6)))
    return Path(directory)

def altered(model, target, change=None, **config):
    """A copy of the model's folder at `target`, with these entries in its config.json, then changed by
    change(target)."""
    target = Path(shutil.copytree(model, target))
    if config:
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if change:
        change(target)
    return target

def turns(*roles):
    return [dict(role=role, content=f"text {i}") for i, role in enumerate(roles)]

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

def write_rows(path, n=40):
    path.write_text("".join(json.dumps(dict(problem=f"What is {i} + {i}?", answer=str(2 * i))) + "\n"
                            for i in range(n)))
    return path

def small_run(model, data, out, **options):
    """The arguments of a small run of opsdc.py."""
    settings = dict(model=model, data=data, out=out, steps=6, batch_size=6, lr=1e-3, refresh_every=2,
                    save_every=2, max_prompt_tokens=512, max_response_tokens=24) | options
    return [word for name, value in settings.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", value])]

def same_metrics(a, b):
    """All that is not a measurement of time or memory."""
    names = [key for key in a
             if not key.startswith("seconds") and key not in ("tokens_per_second", "peak_memory_gib")]
    return {key: a[key] for key in names} == {key: b.get(key) for key in names}

def same_losses(whole, out, steps=6):
    """The run in `out`, on whatever ranks it was resumed, is `whole`'s to 1e-5."""
    for a, b in zip(metrics_of(whole)[:steps], metrics_of(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["response_tokens"] == b["response_tokens"]

def small_files(folder):
    return make_model(folder / "m", "qwen3"), write_rows(folder / "rows.jsonl")

def whole_run(folder):
    """Six steps on one rank, never interrupted, with a refresh after every second one: once for all tests."""
    def make(folder):
        folder.mkdir()
        launch("opsdc.py", *small_run(*small_files(folder), folder / "out"))
    folder = shared(folder, "a-run", make)
    return folder / "m", folder / "rows.jsonl", folder / "out"

@pytest.fixture
def no_group():
    """For a command in this process that joins a group."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

@pytest.fixture
def one_rank(no_group):
    opsdc.start_processes()

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model and a data file with which every check passes."""
    directory = tmp_path_factory.mktemp("good")
    return dict(model=str(make_model(directory / "m", "qwen3")),
                data=str(write_rows(directory / "rows.jsonl")), max_prompt_tokens=512, max_response_tokens=24)

def refusal(command):
    """What `command` says when it refuses, in one line."""
    with pytest.raises((ValueError, OSError)) as error:
        command()
    return " ".join(str(error.value).split())

@pytest.fixture
def refused_early(no_group, monkeypatch):
    """No weights are read, no engine is started, nothing is asked on the terminal."""
    for model in (opsdc.AutoModelForCausalLM, opsdc.AutoModelForMultimodalLM):
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr(opsdc.RolloutEngine, "__init__", lambda *_: pytest.fail("an engine is started"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))

def evaluation(good, out, **change):
    """The arguments of a small evaluation with eval.py."""
    settings = dict(model=good["model"], data=good["data"], out=out, samples=2, max_tokens=60) | change
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

ANY_GAP = dict.fromkeys(opsdc.MAX_GAP, math.inf)  # where no engine sampled what is learned

def opened(path, module=opsdc):
    """The Base of the model in `path`, on rank 0 with its weights."""
    base = module.open_base(str(path), True)
    base.loaded = module.read_weights(base) if torch.distributed.get_rank() == 0 else None
    return base

def loaded(path, module=opsdc, **settings):
    """The model in `path`, in shards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return module.load_model(opened(path, module), device, module.Config(**settings))

def device_of(model):
    """Where to make batches for it: loaded() puts models on a GPU where there is one."""
    return next(model.parameters()).device

def fixed_batch(tokenizer):
    """Problems, and a rollout of each: a cut one, a single token, lengths far apart."""
    texts = ["1+1?", "What is the sum of the first hundred positive integers?", "2+2?", "x", "Find all n."]
    problems = [opsdc.Problem(x, None, opsdc.prompt_ids(tokenizer, x),
                              opsdc.prompt_ids(tokenizer, x, opsdc.INSTRUCTIONS["v1"])) for x in texts]
    torch.manual_seed(1)
    lengths = [7, 90, 1, 33, 20]
    ids = [torch.randint(5, len(tokenizer), (n,)).tolist() for n in lengths]
    return problems, [opsdc.Rollout(i, y, [-1.0] * len(y), finished=i != 1) for i, y in enumerate(ids)]

def other_weights(parameters):
    """A thetabar that is not theta, the same function of each weight however it is sharded."""
    return {name: p.detach() * 1.1 + 0.01 for name, p in parameters}

def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()

def exact_divergence(s, t, kind):
    """The divergence of each row by torch.distributions, in the dtype given (float64 in the tests)."""
    p, q = (torch.distributions.Categorical(logits=x) for x in (s, t))
    m = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    kl = torch.distributions.kl_divergence
    return dict(reverse_kl=kl(p, q), forward_kl=kl(q, p), jsd=(kl(p, m) + kl(q, m)) / 2)[kind]

def spoil_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata=dict(format="pt"))

def edited(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))

def hash_of(model):
    return opsdc.model_hash(opsdc.open_base(str(model), False))

def is_picture(path):
    """Large enough, and not of one colour."""
    from matplotlib import image
    pixels = image.imread(path)
    return min(pixels.shape[:2]) > 400 and pixels.std() > 0.01

# ------------------------------------------------------------------------------------------------ 3. OPSDC.PY

# ---- PROMPTS
def test_prompts_are_the_papers(tmp_path):
    tokenizer = make_tokenizer(["text"], QWEN_TEMPLATE)
    form = ("The last line of your response should be of the form Answer: $Answer (without quotes) where "
            "$Answer is the answer to the problem.")
    remember = 'Remember to put your answer on its own line after "Answer:".'
    v1 = ("Solve the following math problem concisely and correctly. Be direct: avoid unnecessary "
          "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
          "needed to reach the answer.")
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    student = f"Solve the following math problem step by step. {form}\n\n1+1?\n\n{remember}"
    teacher = f"{v1}\n\n{form}\n\n1+1?\n\n{remember}"
    told = opsdc.read_instruction("v1")
    assert tokenizer.decode(opsdc.prompt_ids(tokenizer, "1+1?")) == chat.format(student)
    assert tokenizer.decode(opsdc.prompt_ids(tokenizer, "1+1?", told)) == chat.format(teacher)
    v2 = opsdc.read_instruction("v2")
    assert v2.startswith("Solve the following math problem concisely and correctly. Prioritize a correct "
                         "final answer above brevity. For straightforward")
    assert v2.endswith("and a brief check of the final answer. Never omit a step that the answer depends on.")
    (tmp_path / "c.txt").write_text("Be brief.\n")
    assert opsdc.read_instruction(f"@{tmp_path / 'c.txt'}") == "Be brief."

def test_thinking_reaches_templates_that_know_it():
    qwen, r1 = make_tokenizer(["text"], QWEN_TEMPLATE), make_tokenizer(["text"], R1_TEMPLATE)
    assert qwen.decode(opsdc.prompt_ids(qwen, "1+1?", thinking=False)).endswith("<think>\n\n</think>\n\n")
    assert qwen.decode(opsdc.prompt_ids(qwen, "1+1?", thinking=True)).endswith("<|im_start|>assistant\n")
    assert opsdc.prompt_ids(r1, "1+1?", thinking=True) == opsdc.prompt_ids(r1, "1+1?", thinking=False)
    assert r1.decode(opsdc.prompt_ids(r1, "1+1?")).endswith("<|Assistant|><think>\n")

WRAPPED = opsdc.STUDENT_PREFIX + "1+1?" + opsdc.SUFFIX

def test_only_the_last_turn_of_a_conversation_is_wrapped():
    tokenizer = make_tokenizer(["text"], QWEN_TEMPLATE)

    def prompt(*roles, **options):
        return tokenizer.decode(opsdc.prompt_ids(tokenizer, turns(*roles), **options))
    four, end = ("system", "user", "assistant", "user"), "<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\ntext 0<|im_end|>\n<|im_start|>user\n"
    before = f"{system}text 1<|im_end|>\n<|im_start|>assistant\ntext 2<|im_end|>\n<|im_start|>user\n"
    assert prompt(*four, wrapper="none") == f"{before}text 3{end}"
    assert prompt(*four, wrapper="none", instruction="Be brief.") == f"{before}Be brief.\n\ntext 3{end}"
    assert prompt("system", "user") == system + WRAPPED.replace("1+1?", "text 1") + end
    with pytest.raises(ValueError, match="it has no place for tools"):
        prompt("user", tools=[dict(name="add")])
    tokenizer.chat_template = "{{ tools[0].name }}: {{ messages[0].content }}"
    assert prompt("user", wrapper="none", tools=[dict(name="add")]) == "add: text 0"
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="chat template fails on .*text 0.*: no system here"):
        prompt(*four)

# ---- THE OBJECTIVE
KINDS = ["reverse_kl", "forward_kl", "jsd"]

def objective_inputs(N=37, V=301, d=16, dtype=torch.float32, apart=0.1):
    torch.manual_seed(0)
    hidden, head = torch.randn(N, d), torch.randn(V, d) / 2
    return [x.to(dtype) for x in (hidden, head, hidden + apart * torch.randn(N, d),
                                  head + apart * torch.randn(V, d) / 2)] + [torch.rand(N) / N]

def objective_of(inputs, factor=1, **options):
    """The loss, the gradients of `factor` times it for hidden states and head, and the stats."""
    hidden, head = (x.clone().requires_grad_() for x in inputs[:2])
    loss, stats = opsdc.distill_loss(hidden, head, *inputs[2:], **options)
    assert not any(value.requires_grad for value in stats.values())
    return loss.item(), torch.autograd.grad(factor * loss, (hidden, head)), stats

def objective_in_float64(inputs, kind, scale=1.0, softcap=None):
    """The same by autograd over the whole [N, V]; but for the stats the logits of student and teacher."""
    hidden, head, teacher_hidden, teacher_head, weights = (x.double().requires_grad_() for x in inputs)
    cap = softcap or 1e9  # as good as none
    student = cap * torch.tanh(scale * hidden @ head.T / cap)
    teacher = cap * torch.tanh(scale * teacher_hidden @ teacher_head.T / cap)
    loss = (weights * exact_divergence(student, teacher, kind)).sum()
    return loss.item(), torch.autograd.grad(loss, (hidden, head)), (student.detach(), teacher.detach())

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk, scale, softcap", [
    (1, 1.0, None), (5, 1.0, None), (37, 1.0, None), (256, 1.0, None),
    (7, 0.25, None), (7, 1.0, 2.0), (7, 3.0, 5.0)])  # the slope runs from 1 to 1e-4 under the caps

def test_the_objective_equals_float64(kind, chunk, scale, softcap):
    """Errors of 6e-7 to 9e-7 with every kernel; logits are rounded at 5e-7, log p - log q is about 1."""
    inputs, options = objective_inputs(apart=0.3), dict(scale=scale, softcap=softcap)
    tokens = torch.randint(301, (37,))
    loss, grads, stats = objective_of(inputs, 3, divergence=kind, chunk=chunk, tokens=tokens, **options)
    exact, exact_grads, logits = objective_in_float64(inputs, kind, **options)
    assert loss == pytest.approx(exact, rel=1e-5)
    for grad, exact_grad in zip(grads, exact_grads):
        assert relative_error(grad, 3 * exact_grad) < 1e-5
    p, q = (torch.distributions.Categorical(logits=x) for x in logits)
    means = dict(kl=exact_divergence(*logits, kind), student_entropy=p.entropy(), teacher_entropy=q.entropy())
    for name, values in means.items():
        assert stats[name].item() == pytest.approx(values.mean().item(), rel=1e-5)
    assert torch.allclose(stats["logprob"].double(), p.log_prob(tokens), atol=1e-5)

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart, kl, bound", [(0.006, 5e-4, 2e-6), (0.002, 1e-4, 1e-5)])
def test_a_small_divergence_of_bfloat16_models_is_exact(kind, apart, kl, bound):
    """What makes training work late in a run. Float32 logits of size 5 are rounded at 5e-7, at random from
    place to place, beside a = log p - log q of size 0.014 at KL 1e-4: measured over 1000 tokens an error of
    the loss of 1e-7 to 5e-7 with every kernel, where terms that cancel are wrong by 1.5e-4."""
    inputs = objective_inputs(N=1000, V=2000, d=64, dtype=torch.bfloat16, apart=apart)
    loss, grads, stats = objective_of(inputs, divergence=kind)
    exact, exact_grads, _ = objective_in_float64(inputs, kind)
    assert 0 <= stats["kl"] <= 1.2 * kl and abs(loss / exact - 1) < bound
    # Beside the exact gradient rounded as it is, to 8 bits: what is left are the few values whose float32
    # errors fall on the other side of the rounding's edge; 2e-4 to 5e-4 measured with every kernel.
    for grad, exact_grad in zip(grads, exact_grads):
        assert grad.dtype == torch.bfloat16 and relative_error(grad, exact_grad.bfloat16()) < 2.5e-3

@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_never_negative_and_finite_far_apart(kind):
    """Rows that agree to the last bit or differ by a hundred nats: one side's probability underflows there,
    and exp(-a) overflows. Then a model and itself."""
    torch.manual_seed(0)
    s = torch.randn(300, 400) * torch.logspace(-6, 2, 300)[:, None]
    t = s + torch.randn(300, 400) * torch.logspace(-8, 2, 300)[torch.randperm(300)][:, None]
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    value, gradient = opsdc.divergence_and_gradient(log_p.exp(), log_p, log_q.exp(), log_q, kind)
    assert (value >= 0).all() and gradient.isfinite().all()
    exact = exact_divergence(s.double(), t.double(), kind)
    assert torch.allclose(value.double(), exact, rtol=1e-4, atol=1e-9)
    assert kind != "reverse_kl" or torch.equal(opsdc.reverse_kl(s, t), value)
    inputs = objective_inputs(N=1000, V=2000, d=64, dtype=torch.bfloat16, apart=0.0)
    loss, (_, head_grad), stats = objective_of(inputs, divergence=kind)
    assert loss == pytest.approx(0, abs=1e-11) and head_grad.norm() < 1e-5 and 0 <= stats["kl"] <= 1.2e-6

def test_products_as_on_tensor_cores(monkeypatch):
    """What a GPU computes, with its roundings: products of bfloat16 matrices, summed in float32. At a KL of
    0.0017 the loss is what it is on a CPU, and the gradients of head and hidden states are off by 0.25 %:
    sqrt(2) times 0.17 %, which is what rounding a matrix to bfloat16 costs, once before and once after."""
    inputs = objective_inputs(N=1000, V=2000, d=64, dtype=torch.bfloat16, apart=0.0118)
    addmm, products = torch.addmm, []

    def tensor_cores(old, a, b, beta, out_dtype, out):
        meta = [x.to("meta") for x in (old, a, b)]  # torch has this call, and takes these dtypes
        assert addmm(*meta, beta=beta, out_dtype=out_dtype, out=meta[0]).dtype == torch.float32
        products.append((a.dtype, b.dtype, out.dtype))
        return addmm(old, a.float(), b.float(), beta=beta, out=out)
    cpu_loss, cpu_grads, _ = objective_of(inputs, chunk=250)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", tensor_cores)
        patch.setattr(torch.Tensor, "is_cuda", True)
        gpu_loss, gpu_grads, stats = objective_of(inputs, chunk=250)
    assert products == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 4 * 4  # of four chunks
    exact, exact_grads, _ = objective_in_float64(inputs, "reverse_kl")
    assert 0.0015 < stats["kl"] < 0.002 and gpu_loss == cpu_loss == pytest.approx(exact, rel=3e-6)
    for cpu, gpu, grad in zip(cpu_grads, gpu_grads, exact_grads):
        # the first beside the exact one, rounded alike; the second has a rounding more, whatever the kernels
        assert relative_error(cpu, grad.bfloat16()) < 0.0025 and relative_error(gpu, grad) < 0.003

def test_logits_of_all_tokens_never_exist_at_once():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result
    with Largest() as largest:
        objective_of(objective_inputs(N=256, V=301), chunk=32)
    assert largest.numel == 32 * 301  # the logits of one chunk; the head has 16 x 301

SLOWER = ["default", "avx2"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else ["default"]

@pytest.mark.parametrize("kernels", SLOWER)
def test_slower_kernels_keep_these_bounds(kernels, tmp_path):
    """torch picks its kernels by ATEN_CPU_CAPABILITY when it is imported: the tests above, once more."""
    tests = [test_the_objective_equals_float64, test_a_small_divergence_of_bfloat16_models_is_exact,
             test_a_divergence_is_never_negative_and_finite_far_apart, test_forks_of_the_objective]
    words = [sys.executable, "-m", "pytest", "-q", *(f"{__file__}::{test.__name__}" for test in tests)]
    done = subprocess.run(words, env=ENVIRONMENT | {"ATEN_CPU_CAPABILITY": kernels}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-3000:]

# ---- STUDENT AND TEACHER
# The proof of the sharded gradient, in four parts. The worker computes loss and gradients as opsdc.py does,
# in shards, micro-batches and chunks. The reference is the loss as the paper writes it, of the unsharded
# model in float64, one unpadded sequence at a time. The check compares them tensor by tensor. The tests do so
# for a tied model on one rank, and for an untied one on four, as one copy or as two replicas.

def sharded_gradients(file, settings):
    """Worker: for each of `settings`, {name: settings of opsdc.py} in JSON, loss and full gradients of the
    fixed batch under a thetabar that is not theta; and how they came about."""
    device, found, forwards = opsdc.start_processes(), {}, []
    opsdc.MAX_GAP = ANY_GAP  # no engine here, hence no logprobs to agree with
    collectives = mock.Mock(wraps=torch.distributed)  # records what it passes on
    torch.distributed.all_reduce = collectives.all_reduce
    torch.distributed.reduce_scatter_single = collectives.reduce_scatter_single
    for name, setting in json.loads(settings).items():
        opsdc.DTYPE = torch.bfloat16 if name == "bfloat16" else torch.float32
        cfg = opsdc.Config(**setting)
        problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(cfg.model))
        model = opsdc.load_model(opened(cfg.model), device, cfg)
        weights, theta = dict(model.lm.named_parameters()), opsdc.snapshot(model, torch.float32)
        batches = opsdc.make_micro_batches(rollouts, problems, device, cfg)
        teacher = opsdc.teacher_pass(model, other_weights(weights.items()), batches)
        model.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        forwards.clear()
        collectives.reset_mock()
        loss = opsdc.student_pass(model, batches, *teacher, cfg)["loss"]
        sums = [(collective, torch.distributed.get_world_size(options.get("group")))
                for collective, _, options in collectives.mock_calls]
        dtypes = {x.dtype for call in collectives.mock_calls for x in (*call.args, *call.kwargs.values())
                  if isinstance(x, torch.Tensor)}
        found[name] = dict(loss=loss, sums=sums, forwards=len(forwards), dtypes=dtypes,
                           grads={key: p.grad.full_tensor().cpu() for key, p in weights.items()},
                           theta_back=all(torch.equal(p.full_tensor(), theta[key].full_tensor())
                                          for key, p in weights.items()))
    if torch.distributed.get_rank() == 0:
        torch.save(found, file)
    torch.distributed.destroy_process_group()

def exact_objective(student, teacher, problems, rollouts):
    """1/B sum_i 1/|y_i| sum_t KL(p || q), as the paper writes it."""
    loss = 0
    for rollout in rollouts:
        problem, y = problems[rollout.index], rollout.ids
        s = student(torch.tensor([problem.student + y])).logits[0, len(problem.student) - 1:-1]
        t = teacher(torch.tensor([problem.teacher + y])).logits[0, len(problem.teacher) - 1:-1].detach()
        loss = loss + exact_divergence(s, t, "reverse_kl").sum() / len(y) / len(rollouts)
    return loss

def exact_gradients(path):
    """The reference."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for _ in range(2))
    teacher.load_state_dict(other_weights(student.named_parameters()), strict=False)  # but for a tied head
    loss = exact_objective(student, teacher, *fixed_batch(AutoTokenizer.from_pretrained(path)))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}

def check_gradients(folder, model, ranks, **settings):
    """What the worker finds for each of `settings`, after it was compared with the reference."""
    settings = {name: dict(model=str(model)) | setting for name, setting in settings.items()}
    launch(sharded_gradients, folder / "found.pt", json.dumps(settings), ranks=ranks)
    found = torch.load(folder / "found.pt", weights_only=False)
    exact, exact_grads = exact_gradients(model)
    for name, result in found.items():
        # bfloat16 is for activations, as on GPUs; the tokens' weights, logits and gradients are float32
        loss_bound, bound = (1e-2, 0.05) if name == "bfloat16" else (1e-5, 1e-4)
        assert result["dtypes"] <= {torch.float32, torch.float64}  # no sum in bfloat16
        assert result["theta_back"] and result["loss"] == pytest.approx(exact, rel=loss_bound)
        assert result["grads"].keys() == exact_grads.keys()
        for weight, grad in result["grads"].items():
            error = relative_error(grad, exact_grads[weight])
            assert grad.dtype == torch.float32 and error < bound, f"{name}, {weight}: {error}"
    return found

ONE = dict(micro_batch_tokens=1, loss_chunk=1000)  # one sequence a micro-batch
SOME = dict(micro_batch_tokens=700, loss_chunk=7)
ALL = dict(micro_batch_tokens=100_000, loss_chunk=256)  # all that fit

def test_the_sharded_gradient_of_a_tied_model_on_one_rank(tmp_path):
    """Recomputing activations changes no bit of it, nor does dropout in the config."""
    model = make_model(tmp_path / "m", "qwen3")
    dropping = altered(model, tmp_path / "dropping", attention_dropout=0.1)
    found = check_gradients(tmp_path, model, 1, one=ONE, some=SOME, all=ALL, bfloat16=ALL,
                            not_recomputed=ALL | dict(gradient_checkpointing=False),
                            dropout=ALL | dict(model=str(dropping)))
    forwards = [10, 6, 2, 2, 1, 2]  # of a layer: one a micro-batch, and another in backward
    assert [result["forwards"] for result in found.values()] == forwards
    for name in () if torch.cuda.is_available() else ("not_recomputed", "dropout"):  # a GPU adds in any order
        assert found[name]["loss"] == found["all"]["loss"]
        for weight, grad in found["all"]["grads"].items():
            assert torch.equal(found[name]["grads"][weight], grad)

def test_the_sharded_gradient_of_an_untied_model_on_four_ranks(tmp_path):
    """Over all of them or within two replicas, which are summed over once, after the last micro-batch."""
    two = dict(replicas=2)
    found = check_gradients(tmp_path, make_model(tmp_path / "m", "llama"), 4, one=ONE, some=SOME, all=ALL,
                            bfloat16=ALL, two_one=ONE | two, two_some=SOME | two, two_all=ALL | two)
    whole = [("reduce_scatter_single", 4)] * 5  # two layers, embedding, norm, head
    first = [("reduce_scatter_single", 2)] * 5
    last = [("reduce_scatter_single", 2), ("all_reduce", 2)] * 5
    ends = [("all_reduce", 4)] * 2  # the means, and the largest gap
    sums = [whole * 2, whole * 2, whole, whole, first + last, first + last, last]
    assert [result["sums"] for result in found.values()] == [of_weights + ends for of_weights in sums]

def test_thetabar_is_refreshed_after_every_m_steps():
    model, thetabar = types.SimpleNamespace(lm=torch.nn.Linear(2, 2)), {}
    for m, kept in ((2, [True, False, True, False]), (0, [True] * 4)):
        cfg = opsdc.Config(refresh_every=m)
        assert [opsdc.refresh(model, thetabar, step, cfg) is thetabar for step in (1, 2, 3, 4)] == kept
    assert opsdc.Config().refresh_every == 50  # the paper's

# ---- ROLLOUTS
@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (3, 8)])
def test_batch_at_covers_each_epoch_once(n, batch_size):
    stream = [i for step in range(n) for i in opsdc.batch_at(n, step, batch_size, seed=1)]
    epochs = [stream[k:k + n] for k in range(0, len(stream), n)]
    assert len(stream) == n * batch_size and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew
    assert opsdc.batch_at(n, 5, batch_size, seed=1) != opsdc.batch_at(n, 5, batch_size, seed=2)

@pytest.mark.parametrize("tp", [1, 2])
def test_engines_share_a_batch_that_they_do_not_divide(tp, monkeypatch):
    engine, shares = types.SimpleNamespace(tp=tp), []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    for rank in range(0, 4, tp):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        shares += opsdc.RolloutEngine.share(engine, list(range(7)))
    assert shares == list(range(7))

def without_cpu_packing():
    """vLLM's layers as on a GPU: a reload goes into the tensors that are there. On CPUs it packs them."""
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    class NoCpu(type(linear.current_platform)):
        def is_cpu(self):
            return False
    linear.current_platform = utils.current_platform = vocab_parallel_embedding.current_platform = NoCpu()

def sync_over_nan(engine, model, sync=opsdc.RolloutEngine.sync):
    """engine.sync into parameters that are NaN (asleep they are nothing): all are written, none moves."""
    def weights():
        return dict(engine.llm.apply_model(lambda module: list(module.named_parameters()))[0])
    before = {name: p.data_ptr() for name, p in weights().items()}
    for p in weights().values() if not engine.sleeps else ():
        p.data.fill_(math.nan)
    sync(engine, model)
    assert len(before) > 5 and {name: p.data_ptr() for name, p in weights().items()} == before
    assert all(p.isfinite().all() for p in weights().values())

def measure_sync(model_path, file, vllm_tp):
    """Worker: rollouts, mean logprob and largest gap after a sync, at a low temperature, after theta moved,
    after the next sync. Then the tensors that a sync gathers, all there are, and the GiB that sleep frees."""
    device = opsdc.start_processes()
    if device.type == "cpu":
        without_cpu_packing()
    base, cfg = opened(model_path), opsdc.Config(model=model_path, max_prompt_tokens=512,
                                                 max_response_tokens=40, vllm_tp=int(vllm_tp))
    problems, _ = fixed_batch(base.tokenizer)
    engine, model = opsdc.RolloutEngine(base, cfg), opsdc.load_model(base, device, cfg)

    def step(synced, cfg=cfg):
        if synced:
            sync_over_nan(engine, model)
        rollouts = opsdc.sample_rollouts(engine, problems, [0, 1, 2, 4], 1, base.tokenizer, cfg)
        batches = opsdc.make_micro_batches(rollouts, problems, device, cfg)
        teacher = opsdc.teacher_pass(model, opsdc.snapshot(model), batches)
        gap = opsdc.student_pass(model, batches, *teacher, cfg)["logprob_gap_max"]
        model.zero_grad()
        return [r.ids for r in rollouts], statistics.fmean(x for r in rollouts for x in r.logprobs), gap
    found = [step(synced=True), step(synced=False, cfg=dataclasses.replace(cfg, temperature=0.05))]
    opsdc.copy_into(model, {name: 1.1 * w for name, w in opsdc.snapshot(model, torch.float32).items()})
    try:
        found.append(f"not stopped: {step(synced=False)}")
    except RuntimeError as error:
        found.append(str(error))
    opsdc.MAX_GAP = ANY_GAP
    found += [step(synced=False), step(synced=True)]
    with mock.patch.object(DTensor, "full_tensor", autospec=True, side_effect=DTensor.full_tensor) as gather:
        engine.sync(model)
    awake = torch.cuda.mem_get_info()[0] if engine.sleeps else 0
    engine.sleep()
    freed = torch.cuda.mem_get_info()[0] - awake if engine.sleeps else 0
    found.append([gather.call_count, len(list(model.parameters())), freed / 2**30])
    if torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(found))

@pytest.mark.skipif(torch.cuda.is_available(), reason="the bounds are float32's; the command gpu measures it")
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_weight_sync_is_seen_in_the_logprob_gap(family, tmp_path):
    """Of a tied model, and of an untied one by tensor parallelism in one engine; with vLLM's reload as on a
    GPU, while the other runs here have the CPU's."""
    ranks = dict(qwen3=1, llama=2)[family]
    launch(measure_sync, make_model(tmp_path / "m", family), tmp_path / "found.json", ranks, ranks=ranks)
    found = json.loads((tmp_path / "found.json").read_text())
    (ids, warm, fresh), (_, cold, sharp), stopped, (*_, stale), (new_ids, _, again), counts = found
    assert fresh < 1e-4 and sharp < 1e-4 and again < 1e-4 and stale > 1e-2
    assert cold > warm + 1  # --temperature 0.05 draws what is likely; the logprobs stay the model's own
    assert "No update was made" in stopped
    assert ids != new_ids  # the same seeds, other weights
    assert counts[0] == counts[1]  # gathered: each parameter once, a tied head too

def test_calls_of_the_engine_on_a_gpu(good, one_rank, monkeypatch):
    """An engine that records, where torch believes in a GPU: with which arguments it is made, in which order
    it sleeps, wakes, is loaded and asked. With load_format="auto" (eval.py) it never sleeps."""
    model, base, loads = loaded(good["model"]), opsdc.open_base(good["model"], False), []
    cfg, (problems, _) = opsdc.Config(**good, vllm_memory=0.7), fixed_batch(base.tokenizer)
    vllm, call, some = mock.MagicMock(), mock.call, mock.ANY
    llm = vllm.LLM.return_value
    llm.apply_model.return_value, llm.generate.return_value = [["model", "lm_head"]], []  # names of modules
    llm.llm_engine.model_config.dtype = torch.bfloat16
    llm.collective_rpc.side_effect = lambda _, kwargs: loads.append(dict(kwargs["weights_iterator"]))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.transformers", vllm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(opsdc, "DTYPE", torch.bfloat16)
    engine, _ = [opsdc.RolloutEngine(base, cfg, load_format) for load_format in ("dummy", "auto")]
    for step in (1, 2):
        engine.sync(model)
        opsdc.sample_rollouts(engine, problems, [0, 1, 0], step, base.tokenizer, cfg)
        engine.sleep()
    detach, asleep = call.llm_engine.engine_core._finalizer.detach(), call.sleep(level=2)
    one_step = (call.apply_model(some), call.wake_up(tags=["weights"]),
                call.collective_rpc("reload_weights", kwargs=some), call.wake_up(tags=["kv_cache"]),
                call.reset_prefix_cache(), call.generate(some, some, use_tqdm=False), asleep)
    assert llm.mock_calls == [detach, asleep, detach, *one_step, *one_step]
    seeds = {options["seed"] for _, options in vllm.SamplingParams.call_args_list}
    assert len(seeds) == 6  # of two steps, each with a problem that comes twice
    assert [len(weights) for weights in loads] == [len(model.lm.state_dict())] * 2
    assert all(w.dtype == torch.bfloat16 for weights in loads for w in weights.values())
    for (_, settings), load_format in zip(vllm.LLM.call_args_list, ("dummy", "auto"), strict=True):
        assert settings["hf_overrides"](AutoConfig.from_pretrained(good["model"])).head_dtype == "float32"
        assert settings == settings | dict(
            distributed_executor_backend="external_launcher", tensor_parallel_size=1, max_model_len=536,
            dtype=torch.bfloat16, enforce_eager=False, enable_chunked_prefill=True, load_format=load_format,
            gpu_memory_utilization=0.7, enable_sleep_mode=load_format == "dummy")

def test_keep_correct_drops_wrong_rollouts():
    rollouts = [opsdc.Rollout(i, [5], [-1.0], True, correct) for i, correct in enumerate((True, False, None))]
    assert opsdc.keep_rollouts(rollouts, opsdc.Config(keep="correct")) == rollouts[:1]
    assert opsdc.keep_rollouts(rollouts, opsdc.Config()) == rollouts

# ---- TRAINING STEP
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_micro_batches_hold_every_sequence_once(world, budget):
    lengths = [9, 3, 8, 4, 4, 7, 1]
    ranks = [opsdc.plan_micro_batches(lengths, budget, rank, world) for rank in range(world)]
    assert sorted(i for rank in ranks for group in rank for i in group) == list(range(7))
    assert len({len(rank) for rank in ranks}) == 1  # all ranks enter FSDP's collectives equally often
    for group in (group for rank in ranks for group in rank if len(group) > 1):
        assert max(lengths[i] for i in group) * len(group) <= budget

def test_a_long_tailed_batch_has_little_padding():
    torch.manual_seed(0)
    lengths = (torch.randn(20, 32) * 0.6 + 8.2).exp().clamp(max=8192).int().tolist()  # mean about 4000
    groups = [[batch[i] for i in group] for batch in lengths for rank in range(8)
              for group in opsdc.plan_micro_batches(batch, 16384, rank, 8) if group]
    assert sum(map(sum, lengths)) / sum(len(group) * max(group) for group in groups) > 0.90

def test_right_pad_marks_the_places_that_predict_the_response():
    inputs, positions = opsdc.right_pad([[5, 6, 7], [1]], [[8, 9], [2]], "cpu")
    assert inputs.tolist() == [[5, 6, 7, 8], [1, 0, 0, 0]]
    assert positions.tolist() == [2, 3, 4]  # 7 -> 8, 8 -> 9; in the second row 1 -> 2

def test_tokens_of_any_weight_count_in_the_means_but_stand_ins_do_not(good, one_rank, monkeypatch):
    """A fork may give a token a weight of zero, or a negative one. What a rank computes only because FSDP's
    collectives need it is not part of the batch."""
    monkeypatch.setattr(opsdc, "MAX_GAP", ANY_GAP)
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(good["model"]))
    cfg, model = opsdc.Config(**good | dict(micro_batch_tokens=1)), loaded(good["model"])
    batches = opsdc.make_micro_batches(rollouts, problems, device_of(model), cfg)
    assert all(batch.real for batch in batches)
    weighed = [batch._replace(weights=batch.weights * (i - 2)) for i, batch in enumerate(batches)]
    stand_in = batches[0]._replace(weights=batches[0].weights * 0, real=False)

    def passed(batches):
        teacher = opsdc.teacher_pass(model, other_weights(model.lm.named_parameters()), batches)
        return opsdc.student_pass(model, batches, *teacher, cfg)
    usual, other = passed(batches), passed(weighed)
    assert usual == passed([*batches, stand_in])
    assert other.pop("loss") != usual.pop("loss") and other == usual
    assert usual["logprob_gap_max"] == max(passed([batch])["logprob_gap_max"] for batch in batches)
    with pytest.raises(RuntimeError, match="engine and trainer differ by nan"):
        passed([stand_in._replace(logprobs=stand_in.logprobs * math.nan, real=True)])

def test_update_clips_the_gradient_and_drops_one_that_is_not_finite(good, one_rank):
    model = loaded(good["model"])
    before = opsdc.snapshot(model, torch.float32)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    size = math.sqrt(sum(p.numel() for p in model.parameters()))
    for norm, clip, moved in ((2.0, 0.5, 0.5), (math.nan, 0.5, 0.5), (0.0, 0.5, 0.5), (2.0, 0, 2.5)):
        for p in model.parameters():
            p.grad = torch.full_like(p, norm / size)
        assert opsdc.update(model, sgd, opsdc.Config(clip=clip)) == pytest.approx(norm, rel=1e-4, nan_ok=True)
        steps = [(p - before[name]).full_tensor().flatten() for name, p in model.lm.named_parameters()]
        assert torch.cat(steps).norm().item() == pytest.approx(moved, rel=1e-3)
        assert next(model.parameters()).grad is None

def train_in_layouts(model_path, directory):
    """Worker: the losses of starts with 1, 1 and 1 replicas, then of some with 1, 2 and 1. Each trains one
    step from the checkpoint of the one before, and refreshes thetabar."""
    device, losses = opsdc.start_processes(), []
    opsdc.DTYPE, opsdc.MAX_GAP = torch.float32, ANY_GAP
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(model_path))
    whole, mixed = Path(directory) / "whole", Path(directory) / "mixed"
    for out, replicas in ((whole, 1), (whole, 1), (whole, 1), (mixed, 1), (mixed, 2), (mixed, 1)):
        cfg = opsdc.Config(model=model_path, micro_batch_tokens=1, replicas=replicas, lr=1e-3)
        model = opsdc.load_model(opened(model_path), device, cfg)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, fused=True)
        thetabar = opsdc.snapshot(model)
        done = opsdc.load_newest(out, model, optimizer, thetabar, cfg) if out.exists() else 0
        losses.append(opsdc.train_step(model, thetabar, optimizer, rollouts, problems, device, cfg)["loss"])
        opsdc.save_checkpoint(out, done + 1, model, optimizer, opsdc.snapshot(model))
    if torch.distributed.get_rank() == 0:
        (Path(directory) / "losses.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()

def test_a_run_that_changes_its_layout_at_each_start_goes_on_the_same(tmp_path):
    launch(train_in_layouts, make_model(tmp_path / "m", "llama"), tmp_path, ranks=4)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(set(losses[:3])) == 3 and losses[3:] == pytest.approx(losses[:3], rel=1e-5)

# -------------------------------------------------------------------------------- 3. OPSDC.PY: MAIN AND AFTER

# ---- MAIN
GAP = 1e-4 if opsdc.DTYPE == torch.float32 else 2e-2  # nats between engine and trainer; often 3e-7 and 1e-2
bit_for_bit = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU no run repeats another exactly")

def train(*arguments):
    """opsdc.py in this process, where something may be injected."""
    sys.argv = ["opsdc.py", *arguments]
    opsdc.run_and_exit(opsdc.main)

def leave(how, moment, *arguments):
    """Worker: opsdc.py. When its last rank comes to the function `moment` in the third step or later, a file
    `left` beside --out gets the time. Then this rank is "killed", "fails" or goes on until the run "ends". A
    file `destroyed` tells that a process group was destroyed, for which NCCL waits long after a failure."""
    out, syncs = Path(arguments[arguments.index("--out") + 1]), []

    def arrive(*_):
        if len(syncs) < 3 or int(os.environ["RANK"]) + 1 < int(os.environ["WORLD_SIZE"]):
            return
        out.with_name("left").write_text(str(time.time()))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "fails":
            raise RuntimeError("this rank fails")
    owner = dict(sync=opsdc.RolloutEngine, fsync=os, grade_rollouts=ev).get(moment, opsdc)
    inject(owner, moment, bool, arrive)  # bool: at every call
    inject(opsdc.RolloutEngine, "sync", bool, lambda *_: syncs.append(1))
    inject(torch.distributed, "destroy_process_group", bool, lambda *_: out.with_name("destroyed").touch())
    train(*arguments)

def killed_at(moment, arguments, ranks=2, how="killed"):
    """`leave` under torchrun: what it says, and the seconds from then until all processes are gone."""
    left = Path(arguments[arguments.index("--out") + 1]).with_name("left")
    left.unlink(missing_ok=True)
    said = launch(leave, how, moment, *arguments, ranks=ranks, torchrun=True, fails=how != "ends")
    return said, time.time() - float(left.read_text())

def checkpoints_in(out):
    """Their names; those of damaged ones without the time at the end."""
    return sorted(re.sub(r"-\d{10}$", "", path.name) for path in out.glob("*checkpoint*"))

@bit_for_bit
def test_a_run_killed_while_saving_and_resumed_equals_a_whole_one(tmp_path):
    """It dies after four steps, before its second checkpoint is whole. Then it is asked for fewer steps."""
    model, data, whole = whole_run(tmp_path)
    out = tmp_path / "out"
    launch(leave, "killed", "fsync", *small_run(model, data, out, export_every=2), fails=-signal.SIGKILL)
    assert len(metrics_of(out)) == 4 and checkpoints_in(out) == ["checkpoint-2"]
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # what a kill in the middle of a line leaves
    said = launch(leave, "ends", "export", *small_run(model, data, out, resume=True, export_every=3))
    assert "--resume: export_every 2 -> 3\n" in said and "each of 3 exports " in said
    assert not (tmp_path / "destroyed").exists()  # for which a normal end would wait too
    assert all(same_metrics(a, b) for a, b in zip(metrics_of(whole), metrics_of(out), strict=True))
    assert [line["teacher_age"] for line in metrics_of(out)] == [0, 1, 0, 1, 0, 1]
    assert checkpoints_in(out) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in out.glob("model*")) == ["model", "model-2", "model-3", "model-6"]
    expected, *others = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (
        whole / "model", out / "model", out / "model-6", out / "model-2"))
    assert [all(torch.equal(w, other[name]) for name, w in expected.items())
            for other in others] == [True, True, False]
    said = launch("opsdc.py", *small_run(model, data, out, steps=4, resume=True))
    assert "6 steps are done" in said and "model is that of step 6" in said and len(metrics_of(out)) == 6

@bit_for_bit
def test_a_rank_killed_while_saving_then_a_damaged_checkpoint(tmp_path):
    """Of two ranks one dies when its shard of checkpoint-3 is written: one rank goes on from checkpoint-1."""
    model, data, whole = whole_run(tmp_path)
    out = tmp_path / "out"
    said, _ = killed_at("fsync", small_run(model, data, out, save_every=1))
    assert "Signal 9 (SIGKILL)" in said and not (tmp_path / "destroyed").exists()
    assert checkpoints_in(out) == ["checkpoint-1", "checkpoint-2"] and (out / opsdc.UNFINISHED).exists()
    (out / "checkpoint-best").mkdir()  # a user's own: neither resumed from nor removed
    os.truncate(out / "checkpoint-2/__0_0.distcp", 9999)
    said = launch("opsdc.py", *small_run(model, data, out, save_every=6, resume=True))
    assert "checkpoint-2, which is not whole: " in said and "1 steps are done" in said
    assert checkpoints_in(out) == ["checkpoint-1", "checkpoint-6", "checkpoint-best", "damaged-checkpoint-2"]
    same_losses(whole, out)

def test_ten_steps_without_a_rollout_to_keep_end_a_run(tmp_path):
    """Of conversations and questions as they are, to which a random model finds no answer."""
    chats = [dict(prompt=turns("system", "user", "assistant", "user"), answer=0)]
    chats += [dict(prompt=[dict(role="user", content=f"Say {i}.")], answer=i) for i in range(9)]
    data, out = as_file(tmp_path, "chats.json.gz", json.dumps(chats)), tmp_path / "out"
    said = launch("opsdc.py", *small_run(make_model(tmp_path / "m"), data, out, steps=50, batch_size=2,
                                         keep="correct", wrapper="none"), fails=1)
    assert "10 steps kept no rollout" in said and checkpoints_in(out) == []  # nothing was learned
    lines, samples = metrics_of(out), (out / "samples.jsonl").read_text()
    assert len(lines) == 10 and not any({"loss", "grad_norm"} & line.keys() for line in lines)
    assert all(line["accuracy"] == line["skipped_updates"] == 0 for line in lines)
    assert '"problem": "Say ' in samples and '"problem": [{"role": "system", "content": "text 0"}' in samples

def train_badly(*arguments):
    """Worker: opsdc.py whose gradients are not a number from the second step on."""
    inject(opsdc, "update", lambda number: number > 1,
           lambda model, *_: next(model.parameters()).grad.fill_(math.nan))
    train(*arguments)

def test_rollouts_of_one_token_then_three_bad_gradients_in_a_row(tmp_path):
    """Responses that are nothing but the end of the turn are trained on; then the gradients go bad."""
    model, data = small_files(tmp_path)
    GenerationConfig(eos_token_id=list(range(400))).save_pretrained(model)  # every token ends it
    said = launch(train_badly, *small_run(model, data, tmp_path / "out"), fails=1)
    assert "RuntimeError: in a row, 3 gradients were not finite" in said.splitlines()[-1]
    lines = metrics_of(tmp_path / "out")
    assert all(line["response_tokens_max"] == 1 and line["truncated"] == 0 for line in lines)
    assert lines[0]["loss"] > 0 and lines[0]["grad_norm"] > 0 and lines[0]["logprob_gap_max"] < GAP
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2, 3] and lines[1]["grad_norm"] is None
    assert checkpoints_in(tmp_path / "out") == ["checkpoint-2"]

@pytest.mark.skipif(not MATH500.exists(), reason="needs MATH-500 as a file")
def test_real_problems(tmp_path):
    """The loop on MATH-500 with a random Qwen3 and a byte-level BPE tokenizer trained on the problems: LaTeX,
    long prompts, all rollouts cut. A decay of 1 / lr leaves nothing of the weights but Adam's last step."""
    texts = [json.loads(line)["problem"] for line in MATH500.read_text().splitlines()]
    said = launch("opsdc.py", *small_run(
        make_model(tmp_path / "m", texts=texts, vocabulary=2000), MATH500, tmp_path / "out", steps=2,
        weight_decay=1000, max_prompt_tokens=400, max_response_tokens=8, instruction="v2", divergence="jsd"))
    assert 250 < int(re.search(r"(\d+) of 500 problems have prompts of at most 400 tokens", said)[1]) < 500
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert all(w.abs().max() < 0.01 for w in trained.parameters())
    assert all(line["loss"] > 0 == line["accuracy"] and line["logprob_gap_max"] < GAP
               and line["truncated"] == 1 for line in metrics_of(tmp_path / "out"))

# ---- CHECKPOINT
def test_checkpoints_unreadable_damaged_or_too_large(good, one_rank, tmp_path, monkeypatch, capsys):
    model, cfg = loaded(good["model"]), opsdc.Config()
    optimizer, weight = torch.optim.AdamW(model.parameters(), lr=1e-3), next(model.parameters())
    state, shard = (model, optimizer, opsdc.snapshot(model)), tmp_path / "checkpoint-2/__0_0.distcp"

    def save(step):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opsdc.update(model, optimizer, cfg)
        opsdc.save_checkpoint(tmp_path, step, *state)
        return weight.full_tensor().clone()
    first, second = save(1), save(2)
    for file in (shard, shard.with_name(".metadata")):
        kept = file.rename(tmp_path / "kept")
        file.symlink_to("/proc/self/mem")  # to read it is an error of input and output
        with pytest.raises(RuntimeError, match=r"checkpoint-2 may be whole, but .*\[Errno 5\] Input"):
            opsdc.load_newest(tmp_path, *state, cfg)
        assert checkpoints_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]
        kept.rename(file)
    assert opsdc.load_newest(tmp_path, *state, cfg) == 2 and torch.equal(weight.full_tensor(), second)
    assert optimizer.param_groups[0]["lr"] == cfg.lr  # not the checkpoint's
    os.truncate(shard, shard.stat().st_size - 1)
    assert opsdc.load_newest(tmp_path, *state, cfg) == 1 and torch.equal(weight.full_tensor(), first)
    assert "checkpoint-2, which is not whole: RuntimeError: PytorchStreamReader" in capsys.readouterr().out
    assert checkpoints_in(tmp_path) == ["checkpoint-1", "damaged-checkpoint-2"]
    for step in (2, 3, 4):
        save(step)
    os.truncate(tmp_path / "checkpoint-3/__0_0.distcp", 9999)
    for file in ("__0_0.distcp", ".metadata"):
        (tmp_path / "checkpoint-4" / file).unlink()
        with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
            opsdc.load_newest(tmp_path, *state, cfg)
        assert checkpoints_in(tmp_path) == ["checkpoint-3", "checkpoint-4", "damaged-checkpoint-2"]
    (tmp_path / opsdc.UNFINISHED).mkdir()
    (tmp_path / opsdc.UNFINISHED / "__0_0.distcp").symlink_to("/dev/full")  # where every write finds no space
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20 - 1))
    with pytest.raises(OSError, match=f"{tmp_path}: no space left on the device"):
        save(5)

def test_an_export_is_whole_or_absent_with_the_files_of_the_start(good, no_group, tmp_path, monkeypatch):
    """Though the model's folder is edited and then removed, and though the last export stops half-way."""
    model, target = altered(good["model"], tmp_path / "m"), tmp_path / "model"
    as_file(model, "additional_chat_templates/tools.jinja", "{{ messages }}")
    as_file(model, "code.py", "")
    device, base = opsdc.start_processes(), opened(model)
    trained = opsdc.load_model(base, device, opsdc.Config())
    tokenizer, names = (model / "tokenizer.json").read_bytes(), {*base.files, "model.safetensors"}
    assert "additional_chat_templates/tools.jinja" in names
    edited(model / "config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0')
    (model / "tokenizer.json").unlink()
    for _ in range(2):
        opsdc.export(trained, base, target)
        assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == names
        assert json.loads((target / "config.json").read_text())["rope_theta"] == 10000
        assert (target / "tokenizer.json").read_bytes() == tokenizer
        assert {w.dtype for w in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
        assert len({(target / name).stat().st_mode for name in ("model.safetensors", "config.json")}) == 1
        shutil.rmtree(model, ignore_errors=True)

    def stop_while_removing(path, **options):
        if Path(path).exists():
            next(Path(path).glob("*.safetensors")).unlink()
            raise KeyboardInterrupt
    monkeypatch.setattr(shutil, "rmtree", stop_while_removing)
    with pytest.raises(KeyboardInterrupt):
        opsdc.export(trained, base, target)
    assert not target.exists() or (target / "model.safetensors").exists()

# ---- FAMILIES
# `python test_opsdc.py families [NAME ...]`: each model that make_model makes from FAMILIES goes through
# opsdc.py (3 updates, a refresh, rollouts past any window), its export through eval.py's engine and
# transformers. A row of the table is family_row, below.
EXPERTS = "vLLM's CPU packs experts at the first load only, which is repaired here"
REMARKS = dict.fromkeys(("Qwen3-MoE", "Mixtral", "GLM4-MoE", "Qwen3-Next"), EXPERTS) | {
    "Qwen3.5": "needs torchvision", "Qwen3.5 text": "needs torchvision",
    "Gemma 2": 'attn_implementation="eager" in transformers, whose sdpa leaves the soft cap out',
    "gpt-oss": "not served: vLLM's reload leaves its experts as they were (sinks are right)",
    "NemotronH": "not served: vLLM's experts without a gate need a GPU",
    "Cohere 2, past the window": "vLLM adds one to the window, which the engine's config takes off"}

def family_run(directory, name):
    """Worker: opsdc.py on directory/model."""
    def forget_kernels(engine):  # without one, vLLM packs the experts anew
        for module in engine.modules():
            if hasattr(getattr(module, "quant_method", None), "moe_kernel"):
                module.quant_method.moe_kernel = None
    if name == "Gemma 3":  # whose weights have other names in a checkpoint
        without_cpu_packing()
        opsdc.RolloutEngine.sync = sync_over_nan
    if REMARKS.get(name) == EXPERTS and not torch.cuda.is_available():
        inject(opsdc.RolloutEngine, "sync", bool, lambda engine, _: engine.llm.apply_model(forget_kernels))
    train(*map(str, small_run(directory / "model", write_rows(directory / "rows.jsonl"), directory / "out",
                              steps=3, batch_size=4, max_response_tokens=40)))

def family_export(directory, name):
    """Worker: mean gap in log-probabilities between eval.py's engine and transformers on the export."""
    path, gaps = str(directory / "out/model"), []
    opsdc.start_processes()
    base, cfg = opsdc.open_base(path, False), opsdc.Config(max_prompt_tokens=512, max_response_tokens=40)
    engine = opsdc.RolloutEngine(base, cfg, load_format="auto")
    prompts = [opsdc.prompt_ids(base.tokenizer, f"What is {i} + {i}?") for i in range(4)]
    samples = engine.generate(prompts, list(range(4)), max_tokens=40, temperature=1.0)
    capped = "attn_logit_softcapping" in FAMILIES[name][1]  # which transformers' sdpa leaves out
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                 attn_implementation="eager" if capped else None)
    for prompt, (ids, logprobs, _) in zip(prompts, samples):
        with torch.no_grad():
            own = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        gaps += (own.gather(-1, torch.tensor(ids)[:, None])[:, 0] - torch.tensor(logprobs)).abs().tolist()
    (directory / "export").write_text(str(statistics.fmean(gaps)))

def family_row(directory, name):
    """A dict of the table: family, the largest gap of a step, the export's gap, remark, seconds."""
    row, start = dict(family=name, gap=None, export=None, remark=REMARKS.get(name, "")), time.perf_counter()
    if row["remark"] == "needs torchvision" and not importlib.util.find_spec("torchvision"):
        return row | dict(remark="skipped: needs torchvision", seconds=0)
    directory = Path(directory) / re.sub(r"\W+", "-", name)
    shutil.rmtree(directory, ignore_errors=True)
    make_model(directory / "model", name)

    def succeeds(worker):
        failed = status_of(fork_process(worker, directory / "log", directory, name))
        if failed:
            row["remark"] += "; " + re.findall(r"\w*[Ee]rror: .*", (directory / "log").read_text())[-1][:150]
        return not failed
    if succeeds(family_run):
        row["gap"] = max(line["logprob_gap"] for line in metrics_of(directory / "out"))
        if succeeds(family_export):
            row["export"] = float((directory / "export").read_text())
    return row | dict(seconds=round(time.perf_counter() - start))

@pytest.mark.parametrize("name", [
    "SmolLM3", "Gemma 3", "Falcon-H1", "Granite", "Gemma 2", "Gemma 4 text", "Mixtral", "Qwen3-Next"])
def test_families_that_differ_most_in_code(name, tmp_path):
    """A transformers backend, a nested config, a hybrid, scaled logits, both soft caps, a buffer in the state
    dict, fused and renamed experts, a kernel for bfloat16 only."""
    row, bound = family_row(tmp_path, name), 2e-2 if name == "Qwen3-Next" else GAP
    assert row["gap"] and row["gap"] < bound and row["export"] is not None and row["export"] < bound, row

def of_type(model_type, architecture, **config):
    return dict(config=dict(model_type=model_type, architectures=[architecture], **config))

BAD_MODELS = {  # as BAD_INPUT, below; m is the model's folder, `config` are entries of its config.json
    "encoder": (of_type("bert", "BertLMHeadModel"), {}, "BertLMHeadModel of type bert"),
    "encoder-decoder": (of_type("bart", "BartForCausalLM", is_encoder_decoder=True), {}, "type bart"),
    "reward": (of_type("qwen3", "Qwen3ForSequenceClassification"), {}, "Qwen3ForSequenceClassification of"),
    "no causal text": (of_type("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", vision_config={}), {},
                       "Qwen2_5_VLForConditionalGeneration of type qwen2_5_vl_text"),
    "no layers": (of_type("bloom", "BloomForCausalLM"), {}, "no attribute 'layers'"),
    "embedding": ({}, {"m/modules.json": "{}"}, "an embedding model"),
    "fp8": (dict(config=dict(quantization_config=dict(quant_method="fp8"))), {}, "quantised weights"),
    "quantised text": (of_type("internvl", "InternVLForConditionalGeneration", text_config=dict(
        model_type="qwen2", quantization_config=dict(quant_method="fp8"))), {}, "quantised weights"),
    "adapter": ({}, {"m/config.json": None, "m/adapter_config.json": "{}"}, "a folder with a chat model"),
    "remote code": (of_type("odd", "OddCausalLM", auto_map=dict(AutoConfig="code.Odd")), {}, "custom code"),
    "pad id": (dict(config=dict(pad_token_id=400)), {}, "a pad_token_id of no token"),
    "no template": ({}, {"m/chat_template.jinja": None}, "no chat template"),
    "raising template": ({}, {"m/chat_template.jinja": "{{ raise_exception('no') }}"}, "What is 0.*: no"),
    "LongRoPE": (dict(config=dict(rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 16, long_factor=[2.0] * 16,
        original_max_position_embeddings=535))), {}, "expected at most the model's context, 535"),
    "no weights": ({}, {"m/model.safetensors": None}, "expected weights, found: .*no file named"),
    "pointer": ({}, {"m/model.safetensors": "version https://git-lfs"}, "found a pointer or half a file")}

@pytest.mark.parametrize("family, config, edit, message", [
    ("HyperCLOVA X", {}, dict, "that are [0-9.]+ nats from those that the loss"),  # * instead of Granite's /
    ("llama", TIED, dict, "two tensors for embedding and head"),
    ("qwen3", {}, lambda weights: {name: w for name, w in weights.items() if "q_proj" not in name}, "q_proj"),
    ("qwen3", {}, lambda weights: {name: w * math.nan for name, w in weights.items()}, "NaN or infinity")],
    ids=["other logits", "not tied", "missing", "NaN"])
def test_weights_are_checked_before_the_engine(family, config, edit, message, good, one_rank, tmp_path):
    model = altered(make_model(tmp_path / "m", family), tmp_path / "model",
                    lambda model: spoil_weights(model, edit), **config)
    cfg = opsdc.Config(**good | dict(model=str(model), out=str(tmp_path / "out")))
    assert re.search(f"weights of its config.json, found: .*{message}", refusal(lambda: opsdc.prepare(cfg)))

def test_one_hash_of_all_that_decides_a_models_output(good, one_rank, tmp_path):
    """The same in a copy and through a link, whatever lies beside; another after any edit."""
    model = Path(shutil.copytree(good["model"], tmp_path / "m"))
    (tmp_path / "link").symlink_to(model)
    for name in ("training_args.bin", "optimizer.bin", "consolidated.safetensors", "README.md",
                 "trainer_state.json", "code.py", "model.safetensors.index.json"):
        as_file(model, name, "{}")
    hashes = {hash_of(path) for path in (good["model"], model, tmp_path / "link")}
    assert len(hashes) == 1
    for name, old, new in (("config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0'),
                           ("generation_config.json", '"eos_token_id": 1', '"eos_token_id": [1, 2]'),
                           ("tokenizer.json", '"single_word": false', '"single_word": true'),
                           ("chat_template.jinja", "assistant", "model")):
        edited(model / name, old, new)
        hashes.add(hash_of(model))
    as_file(model, "additional_chat_templates/tools.jinja", "{{ messages }}")
    hashes.add(hash_of(model))
    spoil_weights(model, lambda weights: {name: w * 1.01 for name, w in weights.items()})
    assert len(hashes | {hash_of(model)}) == 7

def test_shards_that_the_index_names_are_the_weights(good, one_rank, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(good["model"])
    model.generation_config.temperature = None  # save_pretrained refuses it
    path = altered(good["model"], tmp_path / "m", change=lambda path: (path / "model.safetensors").unlink())
    model.save_pretrained(path, max_shard_size="100KB")
    files, same = opsdc.open_base(str(path), False).weight_files, hash_of(path)
    assert sorted(files) == sorted(path.glob("model-*.safetensors")) and len(files) > 1
    shutil.copy(files[0], path / "model-00009-of-00009.safetensors")
    assert hash_of(path) == same
    files[1].unlink()
    assert f"{files[1]}: expected weights, found" in refusal(lambda: hash_of(path))

# ---- CHECKS
@pytest.mark.parametrize("name, values", dict(
    steps="0 -1", batch_size="0", lr="-0.1 NaN Infinity", weight_decay="-0.1 NaN", clip="-1.0 Infinity",
    temperature="-1.0 NaN", max_prompt_tokens="0", refresh_every="-1", save_every="0", export_every="-1",
    vllm_tp="0", replicas="0", vllm_memory="0.0 -0.5 NaN 1.5", seed="-1 4294967296", samples="0",
    max_tokens="0", top_p="0.0 95.0", top_k="-5", block="0").items())

def test_numbers_out_of_range_are_refused(name, values):
    for value in map(json.loads, values.split()):
        assert re.fullmatch(f"--{name} {value}: expected (more than 0|0 or more|at most [0-9]+)",
                            refusal(lambda: ev.check_settings({name: value})))

BAD_INPUT = {  # what is wrong: (settings, contents of files or None for one that is missing, what is said)
    "number": (dict(steps=0), {}, "--steps 0: expected more than 0"),
    "replicas": (dict(replicas=2), {}, "--replicas 2: expected a divisor of the number of ranks, 1"),
    "model": (dict(model="./no"), {}, "--model ./no: expected a folder with a chat model"),
    "context": (dict(max_response_tokens=4000), {}, "expected at most the model's context, 2048"),
    "row": (dict(data="x.jsonl"), {"x.jsonl": '{"text": "x"}'}, "row 1: expected a field problem, "),
    "no answers": (dict(data="x.jsonl", keep="correct"), {"x.jsonl": '{"problem": "x"}'}, "a known answer"),
    "long prompts": (dict(max_prompt_tokens=200), {}, "no problem with so short a prompt"),  # of the teacher
    "save_to_disk": (dict(data="saved"), {"saved/state.json": ""}, "using `save_to_disk`"),
    "one word": (dict(instruction="V3"), {}, "--instruction V3: expected v1, v2, 20%, 50%, 80%, @FILE"),
    "no text": (dict(instruction="@c.txt"), {"c.txt": " \n"}, "expected v1, .* found ''"),
    "latin-1": (dict(instruction="@c.txt"), {"c.txt": b"pr\xe9cis"}, "encoding UTF-8"),
    "others' things": (dict(out="o"), {"o/model": "", "o/x": "", "o/unfinished": ""}, "model, unfinished$"),
    "others' settings": (dict(out="o", resume=True), {"o/config.json": ""}, "found: config.json$"),
    "no lock": (dict(out="o", resume=True), {"o/checkpoint-1": ""}, "found: checkpoint-1"),
    "no folder": (dict(out=""), {}, "--out .: expected a new or empty folder .* found: the present folder"),
    "below a file": (dict(out="c.txt/o"), {"c.txt": ""}, "--out c.txt/o: expected a new or empty folder")}

@pytest.mark.parametrize("case", BAD_MODELS | BAD_INPUT)
def test_bad_input_is_refused_early(case, good, one_rank, refused_early, tmp_path, monkeypatch):
    """Before weights are read and anything is written."""
    settings, files, message = (BAD_MODELS | BAD_INPUT)[case]
    monkeypatch.chdir(tmp_path)
    altered(good["model"], Path("m"), **settings.get("config", {}))
    for name, content in files.items():
        Path(name).unlink() if content is None else as_file(tmp_path, name, content)
    before = sorted(tmp_path.rglob("*"))
    settings = good | dict(model="m", out="out") | {k: v for k, v in settings.items() if k != "config"}
    assert re.search(message, refusal(lambda: opsdc.prepare(opsdc.Config(**settings))))
    assert sorted(tmp_path.rglob("*")) == before

def test_what_this_machine_lacks_is_said_before_a_model_is_looked_for(monkeypatch):
    def said():
        return refusal(lambda: opsdc.prepare(opsdc.Config(model="nowhere")))
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert said().startswith("OMP_NUM_THREADS=0: expected 1 or more")
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert said().startswith("vllm is not installed")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said().startswith("no GPU is seen: expected a driver R580")

def test_a_runs_folder_is_no_other_runs_until_that_is_resumed(good, one_rank, tmp_path, monkeypatch, capsys):
    """Where files cannot be locked, that is a warning."""
    def prepare(resume=False):
        opsdc.prepare(opsdc.Config(**good, out=str(tmp_path / "out"), resume=resume))
    prepare()
    taken = "earlier run (opsdc.py: with --resume), where no other process is at work, found: "
    assert taken in refusal(lambda: prepare(resume=True))  # the other is this process
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    others = [as_file(tmp_path / "out", name, "") for name in ("log.txt", "lost+found/x")]
    prepare()  # the first died before its first checkpoint
    assert "out cannot be locked (No locks available); start no other" in capsys.readouterr().out
    for name in ("checkpoint-1", "model-50"):
        result = as_file(tmp_path, f"out/{name}", "")
        assert f"{taken}{name}" in refusal(prepare)
        prepare(resume=True)
        os.remove(result)
    assert all(map(os.path.exists, others))

def test_a_resumed_run_is_the_same_run(good, one_rank, tmp_path, monkeypatch, capsys):
    """What may be spelled in another way or changed, and what may not."""
    home = tmp_path / "my [old] runs"
    model, copy = (altered(good["model"], home / name) for name in ("m", "copy"))
    file, settings = home / "o/config.json", good | dict(model="~/m", out="~/o", batch_size=8, resume=True)

    def prepare(**change):
        capsys.readouterr()
        opsdc.prepare(opsdc.Config(**settings | change))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("--resume: ")]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # the earlier ones are this process
    monkeypatch.chdir(home)
    (home / "link").symlink_to(model)
    as_file(home, "c [1].txt", f"\ufeff{opsdc.INSTRUCTIONS['v1']}\n")
    shutil.copy(good["data"], home / "rows [1].jsonl")
    prepare()
    as_file(file.parent, "checkpoint-1", "")
    for change in (dict(model="m"), dict(model="../my [old] runs/m/"), dict(model="link"), dict(model="copy"),
                   dict(steps=200, lr=1e-4), dict(instruction=" V1"), dict(instruction="@~/c [1].txt"),
                   dict(data="~/rows [1].jsonl"), dict(clip=0.5, vllm_memory=0.4)):
        said = prepare(**change)
    assert said[0].startswith("--resume: data ")
    assert said[1:] == ["--resume: clip 1.0 -> 0.5", "--resume: vllm_memory 0.5 -> 0.4"]
    prepare()
    spoil_weights(copy, lambda weights: {name: w * 1.01 for name, w in weights.items()})
    for name, value in dict(seed=5, instruction="v2", wrapper="none", batch_size=4, thinking=False,
                            refresh_every=3, temperature=0.5, max_response_tokens=25, model="copy",
                            data=as_file(home, "x.jsonl", '{"problem": "x"}')).items():
        compared = dict(model="model_hash", data="problems").get(name, name)
        assert f"{file}: {compared} is " in refusal(lambda: prepare(**{name: value}))
    edited(file, '"keep": "all",', "")  # an older run lacks newer settings
    assert "keep is 'all', not 'correct'" in refusal(lambda: prepare(keep="correct"))
    assert prepare(lr=5e-6) == ["--resume: lr 1e-06 -> 5e-06"]
    as_file(model, "chat_template.jinja", QWEN_TEMPLATE + " ")
    assert "config.json: template is " in refusal(prepare)
    for text in ("", "[1"):
        file.write_text(text)
        assert f"--resume: the settings of the run in {file}" in refusal(prepare)

def test_an_evaluation_is_named_after_its_model(good, one_rank, tmp_path, monkeypatch):
    model = altered(good["model"], tmp_path / "my [old] runs/m")
    monkeypatch.setenv("HOME", str(model.parent))
    for place, spelled in ((model.parent, "./m/"), (tmp_path, "~/m"), (model, ".")):
        monkeypatch.chdir(place)
        as_file(place, "opsdc.lock", "")  # a run's folder
        args, _ = ev.parse_args(evaluation(good, "", model=spelled))
        assert ev.prepare_evaluation(args)[3] == Path("eval-m")

def test_what_will_be_trained_is_said_at_the_start(good, one_rank, tmp_path, capsys):
    rows = [dict(problem="one", note=5), *[dict(problem="one", answer=answer) for answer in (1, "1", 2)],
            dict(problem="two", answer=2), dict(problem="long " * 500, answer=3),
            dict(problem="three", answer=" "), dict(problem="four", answer="See proof.")]
    data = as_file(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    cfg = opsdc.Config(**good | dict(data=data, out=str(tmp_path / "out"), instruction="20%"))
    base, problems, _ = opsdc.prepare(cfg)
    rows = base.config.vocab_size
    assert f"no row for token id {rows}" in refusal(lambda: opsdc.check_ids(base, [[rows - 1], [rows]]))
    opsdc.check_ids(base, [[rows - 1]])
    assert [p[:2] for p in problems] == [("one", "1"), ("two", "2"), ("three", None), ("four", None)]
    said = capsys.readouterr().out
    for text in ("8 rows, 5 problems, 2 without a known answer, 1 given again with a different answer; "
                 "3 rows were repeats; ",
                 f"the first without an answer: {data}, row 7, no answer; read: problem as problem",
                 "answer as answer", "not read: note", "4 of 5 problems have prompts of at most 512 tokens",
                 "the first teacher's prompt:\n<", "Solve the following math problem correctly using 20%",
                 "each of 3 checkpoints takes ", "each of 1 exports "):
        assert text in said, text

# ---- LOGS: read by the tests of MAIN

# ---- PROCESSES
def start(file, *arguments):
    """Worker: `python -P FILE ARGUMENTS`: no engine is imported, and only lines of the file find eval.py."""
    sys.modules.pop("vllm", None)
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != HERE]
    run_script(file, *arguments)

def test_eval_py_beside_opsdc_py(tmp_path):
    """None, or a script of the user's of that name, is one line; a fork's may import from opsdc.py."""
    script = shutil.copy(HERE / "opsdc.py", tmp_path)
    for make in (lambda: None, lambda: as_file(tmp_path, "eval.py", "answer = 42")):
        make()
        line, = launch(start, script, "--help", fails=1).splitlines()
        assert "needs this project's eval.py beside it" in line
    shutil.copy(HERE / "eval.py", tmp_path / "theirs.py")
    as_file(tmp_path, "eval.py", "from opsdc import Config\nfrom theirs import *\n")
    assert "error: --steps 0: expected more than 0" in launch(start, script, "--steps", 0, fails=1)
    assert "argument --lr: invalid float value: 'high'; see --help" in launch(
        start, HERE / "eval.py", "tokens", "--lr", "high", fails=1)

def start_apart(folder, port, *arguments):
    """Worker: `start` with a store as torchrun has it. Rank 1 starts late, and in a folder of its own."""
    os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    os.chdir(Path(as_file(Path(folder), f"rank-{os.environ['RANK']}/x", "")).parent)
    time.sleep(3 * int(os.environ["RANK"]))
    start(*arguments)

def test_one_rank_says_in_one_line_what_is_wrong(tmp_path):
    """And nothing is written but the mark of a run's folder."""
    model, data = small_files(tmp_path)
    for words, message in (
            (["opsdc.py", "--step", 1], "unrecognized arguments: --step 1; see --help"),
            (["eval.py", "--model", "m", "--samples", "many"],
             "argument --samples: invalid int value: 'many'; see --help"),
            (["opsdc.py", *small_run(model, data, model)], f"--out {model}: expected a new or empty folder "
             "or that of an earlier run (opsdc.py: with --resume), where no other process is at work, found: "
             "config.json"),
            (["opsdc.py", *small_run(model, data, "out")], "--out out: expected one folder that all nodes "
             "share, but rank 1 does not see what rank 0 wrote to opsdc.lock there")):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        said = launch(start_apart, tmp_path, store.port, *words, ranks=2, fails=1)
        assert re.findall("^error: (.*)", said, re.MULTILINE) == [message], said
        assert "usage" not in said and "waits for" not in said
    assert {path.name for path in tmp_path.glob("rank-*/out/*")} == {"opsdc.lock"}

def test_a_failing_rank_ends_all_at_once(tmp_path):
    words = small_run(*small_files(tmp_path), tmp_path / "out", steps=3)
    said = launch(leave, "fails", "teacher_pass", *words, ranks=2, fails=1)
    assert "RuntimeError: this rank fails" in said and not (tmp_path / "destroyed").exists()

def fail_without_the_host():
    """Worker, of two ranks: rank 0, with the store, is stopped as if its host was gone. Then rank 1 fails."""
    def main():
        opsdc.start_processes()
        host = ev.from_rank_0(os.getpid)
        if torch.distributed.get_rank() == 0:
            time.sleep(HANG)
        os.kill(host, signal.SIGSTOP)
        inject(os, "_exit", bool, lambda status: os.kill(host, signal.SIGKILL))  # at the end
        signal.signal(signal.SIGALRM, lambda *_: os._exit(99))
        signal.alarm(300)  # should it wait for the host
        raise RuntimeError("this rank fails")
    opsdc.run_and_exit(main)

def test_a_failing_rank_ends_without_the_host_of_the_store():
    assert "RuntimeError: this rank fails" in launch(fail_without_the_host, ranks=2, fails=-signal.SIGKILL)

def fail_in_turn(how):
    """Worker, of two ranks: rank 0 fails first and is slow to say why, while its peer fails too."""
    store = torch.distributed.distributed_c10d._get_default_store

    def be_slow(error):
        store().set("slow", "")
        process = Path("/proc", store().get("peer").decode(), "status")
        time.sleep(3)  # enough for the peer to end, if it does not wait
        print("its peer is gone" if "State:\tZ" in process.read_text() else "its peer lives")

    def main():
        opsdc.start_processes()
        if torch.distributed.get_rank() == 1:
            store().wait(["slow"])
            store().set("peer", str(os.getpid()))
        raise dict(exit=SystemExit, error=RuntimeError)[how](f"rank {torch.distributed.get_rank()} fails")
    inject(ev, "explain", bool, be_slow)
    opsdc.run_and_exit(main)

@pytest.mark.parametrize("how", ["exit", "error"])
def test_the_first_to_fail_says_why_before_its_peers_end(how):
    said = launch(fail_in_turn, how, ranks=2, fails=1)
    assert said.startswith("its peer lives\n") and "rank 0 fails" in said and "rank 1 fails" not in said, said

def test_imports_start_no_vllm_and_no_group_and_leave_the_environment():
    assert SIDE_EFFECTS == (False, False, False)

# ------------------------------------------------------------------------------------------------- 4. EVAL.PY

# ---- PROBLEMS
CHAT, HUMAN = turns("user", "assistant", "user"), '[{"from": "human", "value": "x"}]'
PROBLEMS_READ = [  # row, its problem as --wrapper math reads it
    (dict(problem="1+1?", prompt="x"), "1+1?"), (dict(prompt=" 1+1?\n", problem=" "), "1+1?"),
    (dict(question=f" {WRAPPED}\n"), "1+1?"), (dict(prompt=[dict(role="user", content=WRAPPED)]), "1+1?"),
    (dict(prompt=CHAT), CHAT), (dict(prompt=json.dumps(CHAT)), CHAT), (dict(messages=CHAT[:1]), "text 0"),
    (dict(prompt=json.dumps([dict(name="Bob") | CHAT[0]])), "text 0"),
    (dict(prompt='[{"name": "Bob", "role": "x"}] as CSV?'), '[{"name": "Bob", "role": "x"}] as CSV?'),
    (dict(problem="[asy] draw(); [/asy]", image=math.nan, images=[None]), "[asy] draw(); [/asy]"),
    (dict(problem="x", image_1=dict(bytes=None, path=None), picture=""), "x")]
PROBLEMS_REFUSED = {  # message: what a row has as its prompt, or rows
    "here: expected a field problem, prompt or question, found (prompt|text|problem, question)$": [
        [], turns("system"), [dict(CHAT[0], content=" ")], dict(text="1?"), dict(problem="", question=None)],
    "here, field prompt: expected a text, or messages with the texts role and content, found ": [
        5, ["text"], [dict(role="user", content=["text"])], json.loads(HUMAN), HUMAN, {"prompt": CHAT[0]}],
    "here, field prompt: expected the user's turn last, found user, assistant": [CHAT[:2]],
    "here, field prompt: .*surrogates not allowed": ["\ud800", [dict(role="user", content="\ud800")]],
    "here, field prompt: .*date": [[CHAT[0] | dict(at=datetime.date.today())]],
    "here, field prompt: expected a JSON object, found \"\\[{'role'": [str(CHAT)]}
PROBLEMS_REFUSED |= {f"here: expected a problem in words, found {found}; take such rows out": [row]
                     for found, row in (
    ("image_1", dict(image_1=dict(bytes=b"x", path=None))), ("images", dict(images=["a.png"])),
    ("body", dict(problem="x", body="Tom")), ("decoded_image", dict(problem="x", decoded_image="x")),
    ("<image_1>", dict(problem="See <image_1>.")), (r"!\[\]\(y.png\)", dict(problem="Find ![](y.png)")))}

def read_here(row, wrapper="math"):
    return ev.read_row(row, "here", *opsdc.WRAPPERS[wrapper])

def test_a_problem_is_read_or_its_row_is_named():
    for row, problem in PROBLEMS_READ:
        assert read_here(row)[0]["problem"] == problem
    for prompt in (f" {WRAPPED}\n", [dict(role="user", content=f" {WRAPPED}\n")]):
        assert read_here(dict(prompt=prompt), "none")[0]["problem"] == f" {WRAPPED}\n"  # as it is
    for message, rows in PROBLEMS_REFUSED.items():
        for row in rows:
            row = row if isinstance(row, dict) else dict(prompt=row)
            assert re.match(message, refusal(lambda: read_here(row))), row

GOLDS_READ = [  # what a row gives as its answer, what is read
    (2, "2"), (0, "0"), (True, "True"), (0.5, "0.5"), (1e-7, "0.0000001"), (10**30 + 1, "1" + 29 * "0" + "1"),
    (1e22, "1" + 22 * "0"), (["2"], "2"), ('["2"]', "2"), ("so 3 + 4 = <<3+4=7>>7\n#### 7", "7"),
    ("\\[ \\boxed{\\frac{1}{2}}. \\]", "\\frac{1}{2}")]
VALUES = ("Mr. and Mrs. Smith of St. Louis", "At 7:20 a.m. Tom of Washington, D.C. Area, or U.S. Steel",
          "it is approx. Five or ca. Six", "see Rome", "below", "no solution", "x = 3", "DNE", "055", "0.10",
          "[1, 2)", "[1, 2]", "{1, 2}")
NO_VALUES = ("Proof.", "notfound", "Not found", "n/a", "None.", "nan", "See proof", "unknown", "?", "-",
             "see the solution above", "assert f(1) == 2", "Proof: trivial.", "word " * 30, b"2", {"a": 1},
             "Suppose that n is even. Then its square is even too.", "因为它是偶数。所以它的平方也是偶数。",
             ["1", "2"], "['1', '2']", '["1", "2"]', '{"inputs": ["1\\n"], "outputs": ["2\\n"]}')
FIELDS_READ = [  # fields of a row, the one that holds its answer
    (dict(solution="so \\boxed{2}"), "solution"), (dict(answer=" ", solution="\\boxed{2}"), "solution"),
    (dict(answer=math.nan, solution="It is two.\n", reward_model=dict(ground_truth=2)), "reward_model"),
    (dict(reward_model='{"ground_truth": 2, "style": "rule"}'), "reward_model"), (dict(answer=None), None),
    (dict(reward_model="rule"), None), (dict(reward_model=dict(ground_truth=["2", "3"])), None)]

def test_an_answer_is_read_or_why_it_is_unknown():
    for gold, text in [*GOLDS_READ, *zip(VALUES, VALUES), *((value, None) for value in NO_VALUES)]:
        field, answer, why = ev.read_answer(dict(answer=gold, solution="\\boxed{9}"))  # not looked at
        assert (field, answer) == (text and "answer", text), gold
        assert why.startswith("answer: ") if text is None else why == "", gold
    for row, expected in FIELDS_READ:
        field, answer, why = ev.read_answer(row)
        assert (field, answer, bool(why)) == (expected, expected and "2", not expected), row

RED = ["red", "green", "blue", "C"]
CHOICES_READ = {"B": [  # letter of the answer, None if it is unknown, or words of the refusal: rows
    *[dict(options=RED, answer=gold) for gold in ("B", "b", "(B)", "B. green", "Option B", "The answer is B.",
                                                  "so #### B", ["B"], "green", "(green).", "1", 1, 1.0)],
    dict(options=["B", "A", "D", "C"], answer="A"), dict(options=["2", "4", "1"], answer=1),
    dict(options=[3, 4.5], answer="4.5"), dict(options=["all", "N/A"], answer="N/A"),
    dict(choice_list=[*RED, "N/A", "N/A"], ground_truth=1), dict(A="red", B="green", C="x", D="", Answer="B"),
    dict(options=json.dumps([*RED, "", None]), answer="B", answer_index=1),
    dict(options=dict(B="green", A="red", E=None), answer="green", answer_idx="B"),  # MedQA
    dict(choices=dict(text=["red", "green"], label=["A", "B"]), answerKey="B"),  # ARC
    dict(choices=dict(text=["red", "green", "blue"], label=["1", "2", "3"]), answerKey="2"),
    dict(choices=dict(A="red", C="green"), answer="C"), dict(opa="red", opb="green", opc="x", opd="y", cop=1),
    dict(option_a="red", option_b="green", correct_answer="b"),
    dict(options=["A)red", "B)green", "C)blue"], correct="B"),  # AQuA
    dict(options=["(A) red", "(B) green"], answer="green")],
    "C": [dict(options=["2", "4", "1"], answer="1")], "D": [dict(options=RED, answer="C")],
    None: [dict(options=RED, answer=gold) for gold in (None, "", -1, "N/A", {"a": 1})],
    "answer the letter, text or place of an option, found '": [
        dict(options=[*RED, ""], answer=gold) for gold in ("B. red", "F", "yellow", "E")],
    "the same option, found answer 'B', answer_index 2": [dict(options=RED, answer="B", answer_index=2)],
    "two to ten texts": [dict(options=["x", "", "y"], answer="A"), dict(options=["x", None], answer="A")],
    "a list of options, found 'xy'": [dict(options='"xy"', answer=1)],
    "in words, found option1, option2": [dict(option1="red", option2="green", answer="1")]}

def test_the_right_option_by_its_letter_text_or_place():
    for expected, fields in ((expected, row) for expected, rows in CHOICES_READ.items() for row in rows):
        row = {ev.field_name(name): value for name, value in dict(question="Which?", **fields).items()}
        if expected and len(expected) > 1:
            assert re.match(f"here.*{expected}", refusal(lambda: read_here(row))), row
            continue
        found, why, uses = read_here(row)
        assert (found["answer"], bool(why)) == (expected, expected is None), row
        lines = found["problem"].split("\n")
        assert [line[1] for line in lines[3:]] == [*"ABCDEFGHIJ"[:len(lines) - 3]], row
        assert "options" in uses.values() and "N/A" not in str(lines[5:]), row
        assert "red" not in found["problem"] or lines[3:5] == ["(A) red", "(B) green"], row

def test_files_of_every_kind_as_a_person_types_their_paths(tmp_path, monkeypatch):
    rows = [dict(problem="a, \u2028b\n?", answer="055"), dict(problem="\u00e9", answer="0.10")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows)
    texts = dict(jsonl=lines, json=json.dumps(rows, indent=1),
                 csv='problem,answer\r\n"a, \u2028b\n?",055\r\n\r\n\u00e9,0.10\r\n')
    contents = {kind + gz: "\ufeff" + text for kind, text in texts.items() for gz in ("", ".gz")}
    contents["parquet"] = as_parquet(rows)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "br [1] *")
    for place, kind in [*itertools.product(["here"], contents), *itertools.product(
            ("br [1] *", "x.jsonl", "a:b", "link"), ("parquet", "csv", "jsonl.gz"))]:
        directory, train, test = tmp_path / place / f"x.{kind}", f"train.{kind}", f"test.{kind}"
        for name in (train, test) * (place != "link"):
            directory.mkdir(parents=True, exist_ok=True)  # a folder named as a file
            as_file(directory, name, contents[kind])
        monkeypatch.chdir(directory)
        for source, name in ((train, train), (f"../x.{kind}/{train}", train), (f"../x.{kind}::test", test),
                             (f"~/{place}/x.{kind}/{train}", train), (f"~/{place}/x.{kind}::test", test),
                             (f"{directory}", train), (f"{directory}/{train}", train)):
            wheres, found = zip(*ev.read_rows(source))
            assert list(found) == rows, source
            for number, where in enumerate(wheres, 1):
                assert where.endswith(f"{source if kind == 'parquet' else name}, row {number}"), where

ROW_X, ROW_Y = as_parquet([dict(problem="x", answer="1")]), as_parquet([dict(problem="y", answer=2, level=3)])
FILES = {  # name: content
    "half.jsonl": '{"problem": "x"}\n\n{"problem"\n', "five.jsonl": "5\n", "five.json": '[{"a": "x"}, 5]',
    "deep.jsonl": "[" * 100000, "latin.jsonl": '{"problem": "\u00e9"}'.encode("latin-1"), "void.parquet": "",
    "wide.csv": "problem,answer\nx,1,2\n", "utf16.csv": "problem\n\u00e9\n".encode("utf-16"),
    "git.parquet": "version https://git-lfs", "both/x.jsonl": "", "both/x.csv": "", "one/test.csv": "a\n",
    "mixed/a.parquet": ROW_X, "mixed/b.parquet": ROW_Y, "two/README.md": "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("en", "cn")) + "---\n",
    "two/en/a.parquet": ROW_X, "two/cn/a.parquet": ROW_Y}
SOURCES_REFUSED = {  # source: message
    "half.jsonl": "half.jsonl, line 3, expected a JSON object, found '{\"problem\"", "": "No such file",
    "five.jsonl": "row 1 .* JSON object, .* 5", "five.json": "five.json: .* 5", "deep.jsonl": "a JSON object",
    "latin.jsonl": "latin.jsonl: expected .* encoding UTF-8", "utf16.csv": "utf16.csv: .* encoding UTF-8",
    "wide.csv": "wide.csv: .* row 1 .* more cells than columns", "git.parquet": "git.parquet: expected",
    "void.parquet": "void.parquet: expected", "both": "both: .* files .csv and .jsonl; name one of them",
    "no.jsonl": "No such file or folder: no.jsonl", "one/no such": "No such file or folder: one/no such",
    "one::validation": "no split validation, but test; name it: one::S", "mixed": "mixed: expected .*level",
    "two": "two: expected .*'en', 'cn'", "two:fr": "two:fr: expected .*'en', 'cn'"}

def test_sources_that_cannot_be_read_are_named_with_the_cause(tmp_path, monkeypatch):
    for name, content in FILES.items():
        as_file(tmp_path, name, content)
    monkeypatch.chdir(tmp_path)
    for source, message in SOURCES_REFUSED.items():
        assert re.search(message, refusal(lambda: [*ev.read_rows(source)])), source
    for content, problem in ((ROW_Y, "y"), (ROW_X, "x")):  # `datasets` has the first in its cache
        as_file(tmp_path, "two/cn/a.parquet", content)
        assert [row["problem"] for _, row in ev.read_rows("two:cn")] == [problem]

def test_a_row_that_comes_again_is_parsed_once(tmp_path, monkeypatch, capsys):
    """Whatever its other fields say; of a table only the fields that are read become Python's objects, in
    which the nulls that Arrow adds are absent."""
    calls = [dict(function=dict(name="a", arguments=dict(x=1)))]
    chat = [CHAT[0], dict(role="assistant", tool_calls=calls), CHAT[2]]
    tools = [dict(type="function", function=dict(name=name, parameters={name: dict(type="number")}))
             for name in "ab"]
    tools_of = [None] * 5 + [tools[:1]]  # the sixth problem is the first, with a tool
    rows = [dict(prompt=[dict(role="user", content=f"What is {i % 5}?")], extra_info=dict(index=again),
                 reward_model=dict(ground_truth=str(i)), tools=tools_of[i])
            for again in range(100) for i in range(6)]
    rows += [dict(prompt=chat, reward_model=dict(ground_truth="6"), extra_info=None, tools=tools)] * 100
    parsed, parse = [], ev.read_row
    monkeypatch.setattr(ev, "read_row", lambda row, *_: parsed.append(row) or parse(row, *_))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (("x.jsonl", lines), ("x.parquet", as_parquet(rows)), ("y.jsonl.gz", lines)):
        parsed.clear()
        found = ev.read_problems(as_file(tmp_path, name, content))
        assert [(p["problem"], p["tools"], p["answer"]) for p in found] == [
            *[(f"What is {i % 5}?", tools_of[i], str(i)) for i in range(6)], (chat, tools, "6")]
        assert name != "x.parquet" or {row["extra_info"] for row in parsed} == {None}
        assert len(parsed) == 7 and [p["number"] for p in found] == [1, 2, 3, 4, 5, 6, 601]
        assert {*found[0]} == {"problem", "tools", "answer", "ids", "number"}
        said = capsys.readouterr().out
        assert ("700 rows, 7 problems, 0 without a known answer, 0 given again with a different answer; "
                "693 rows were repeats; read: prompt as problem, reward_model as answer, tools as tools; "
                "not read: extra_info") in said

def test_formats_of_their_own_get_a_hint_and_pictures_are_counted(tmp_path, capsys):
    asked = (WRAPPED, 'Write the answer after "####".', "Put it within \\boxed{}.", "Use <answer> tags.")
    data = as_file(tmp_path, "x.json", json.dumps([dict(problem=text) for text in asked]))
    ev.read_problems(data, *opsdc.WRAPPERS["math"])
    assert f"3 prompts ask for a format of their own ({data}, row 2 is the first)" in capsys.readouterr().out
    ev.read_problems(data)
    assert "--wrapper none" not in capsys.readouterr().out
    asked = ("1", "<image>", "<img> 3", "4")
    data = as_file(tmp_path, "y.json", json.dumps([dict(problem=text) for text in asked]))
    assert re.search("row 2: .* found <image>; .* .2 of 4 rows", refusal(lambda: ev.read_problems(data)))

# ---- GRADING
FORMATS = [  # X stands for the value
    "It is clear.\n\nAnswer: X", "**Answer:** X", "Done.\n\n**Answer: X**", "Answer: $X$", "Answer: \\(X\\)",
    "Answer: `X`", "Answer：X", "Answer:\n\nX", "**Answer:**\n\n$$\nX\n$$\n", "Answer:\n\\[\nX\n\\]",
    "Answer: $X$.", "Answer: X<|im_end|>", "Therefore \\[\\boxed{X}\\]", "Answer: $\\boxed{X}$.",
    "<think>\nPerhaps \\boxed{-7919}? Answer: -7919\n</think>\n\nAnswer: X",
    "<seed:think>\nPerhaps \\boxed{-7919}?</seed:think>\n\nAnswer: X"]
GOLDS = [
    "73", "12345", "121_3", "\\frac{5}{7}", "-\\frac{7\\pi}{12}", "\\$12.40", "(2, -3)", "\\text{Thursday}",
    "\\left( 3, \\frac{\\pi}{2} \\right)", "\\{1,4,9\\}", "(-\\infty, -2) \\cup (3, \\infty)", "y = 2x + 3",
    "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "11 \\text{ meters}", "4 + 2\\sqrt{3}", "[-2,7)"]

@functools.cache
def math500_rows():
    """Those of ../shared, else of the hub or its cache; None where nothing answers within a minute."""
    def from_hub():
        return [row for _, row in ev.read_rows(ev.BENCHMARKS["math500"])]
    return ev.read_lines(MATH500) if MATH500.is_file() else ev.within_seconds(60, from_hub)

def math500(*fields):
    """These columns of MATH-500; the test is skipped where it is not to be had."""
    rows = math500_rows() or pytest.skip("MATH-500 is neither in ../shared nor on a hub that answers")
    return [[row[field] for row in rows] for field in fields]

def wrongly_graded(texts, golds, expected):
    """The pairs of these whose verdict is not the expected one."""
    verdicts = ev.grade_all(texts, golds)
    return [pair for *pair, verdict in zip(texts, golds, verdicts) if verdict.correct is not expected]

@pytest.mark.parametrize("source", ["built in", "MATH-500"])
def test_every_format_takes_the_right_value_and_refuses_a_wrong_one(source):
    golds, solutions = GOLDS, [f"So \\boxed{{{gold}}}." for gold in GOLDS]
    if source == "MATH-500":
        golds, solutions = math500("answer", "solution")
    bare = [gold.rpartition("=")[2] for gold in golds]
    wrong = [next(other for other in bare[i:] + bare if other != bare[i]) for i in range(len(golds))]
    unsolved = [solution[:solution.find("\\boxed")] for solution in solutions]
    for texts, values, expected in ((solutions, golds, True), (unsolved, wrong, False)):
        texts = texts + [text.replace("X", value) for text in FORMATS for value in values]
        assert wrongly_graded(texts, golds * (1 + len(FORMATS)), expected) == []

RESPELLED = [  # pattern, what may stand in its place: the same value
    (r"[+=&]|\\\\", r" \g<0> "), (r"\\frac", r"\\dfrac"), (r"\\frac\{(\d)\}\{(\d)\}", r"\\tfrac\1\2"),
    (r"^", r"\\displaystyle "), (r"(?<!\.)$", "."), (r"\\(text|mbox)\{", r"\\mathrm{"),
    (r"(?<![\d.,_{])(\d{1,3})(\d{3})(?![\d.,_}])", r"\1,\2"), (r"^-?[\d.]+$", r"\g<0>\\%"),
    (r"^-?[\d.]+$", r"\g<0>\\text{ units}"), (r"^-?\d+$", r"\\frac{\g<0>0}{10}"), (r"^-?\d+$", r"\g<0>00\\%"),
    (r"^-?\d+$", r"\g<0>.00"), (r"^\d+$", r"0\g<0>"), (r"^(?!.*(=|\\in|text|mbox)).*$", r"u = \g<0>"),
    (r"(?<!\d)\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2"), (r"^\\frac\{(\d+)\}(\{\d+\})$", r"\\frac{\g<1>00}\2\\%"),
    (r"\^\\circ|\\text\{ degrees\}", "°"), (r"\^\\circ", r"\\text{ degrees}"), (r"\^\\circ", ""),
    (r"^\\\$(.*)", r"\1\\text{ dollars}"), (r"^\\\$", ""), (r"^.*\\text\{\((.)\)\}", r"Option \1"),
    (r"^.*\\text\{\((.)\)\}", r"\\textbf{(\1)} because"), (r"\\(text|mbox)\{([^()]*)\}", r"\2"),
    (r"\\mbox\{ (cm|inches)\}\^2", ""), (r"(\d|\)) ?\\mbox\{ (cm|inches)\}\^2", r"\1\\text{ square \2}"),
    (r"^(?!.*\\(text|left))(.*)\(([^()]*)\)", r"\2\\left(\3\\right)"), (r"(?<=[(+=]) ?(?!.*\\text)", r"\\,"),
    (r"^(?!.*\\( |text))(.*)(?<![a-zA-Z\d]) +", r"\2"), (r"^(?!.*\\( |text))(.*\d) (?![a-z\d])", r"\2")]
MUTATED = [  # what makes another value of it: a sign, a digit, a cell, an end of an interval, an operator
    (r"(?<![\\a-zA-Z])[1-6]", "7"), (r"(?<![\\a-zA-Z])[07-9]", "4"), (r"(?<=[\d)}a-z] )-|^-", "+"),
    (r"\+", "-"), (r"\\cup", r"\\cap"), (r"^\[|(?<=cup )\[", "("), (r"\](?=$| \\cup)", ")"),
    (r"^\\\$(.*)", r"\1 cents"), (r" ?\\text\{ cents\}", " dollars"), (r"\}\^2", "}^3"),
    (r"(?<=mbox\{ )(cm|inches)\}\^2", r"\1}"), (r"\\mbox\{ (cm|inches)\}", r"\\text{ m}"),
    (r"^(.*\\text\{\()[A-D](?=\)\})", r"\1E"), (r"^.*\\text\{\(([A-E])\)\}$", r"\1 or F"),
    (r"(\\begin\{pmatrix\}|\() *([^,&() ]+?) *(,|&|\\\\) *(?!\2[ &),\\])([^,&() ]+?)(?= *([&),]|\\[\\re]))",
     r"\1\4\3\2")]
MUTATED += [(r"^\\text\{[^(].*", other) for other in (r"not \g<0>", r"\g<0> or north", "none")]
MUTATED += [(r"^(?!0$)(\d+(\.\d+)?|\\frac\{\d+\}\{\d+\})$", other) for other in (
    r"-\1", r"\1 \\text{ or } 8191", r"\1, 8191", r"\1\\text{ million}", r"\1i", r"\1\\%\\text{ gain}")]
MUTATED += [(r"^[1-9]\d*$", other) for other in (
    r"\\frac{\g<0>}{100}", r"\g<0>0\\%", r"\g<0>_9", r"\g<0>\\%, 8191\\%", r"0.\g<0>")]

def changed(gold, changes):
    """What each of these changes makes of it, in each place."""
    return {gold[:match.start()] + match.expand(by) + gold[match.end():]
            for pattern, by in changes for match in re.finditer(pattern, gold)} - {gold}

@pytest.mark.parametrize("source", ["built in", "MATH-500", "AIME 2025"])
def test_respelled_golds_are_accepted_and_mutated_ones_are_not(source):
    golds = GOLDS
    if source == "MATH-500":
        golds, = math500("answer")
    elif source == "AIME 2025":
        rows = ev.read_lines(AIME) if AIME.is_file() else pytest.skip(f"{AIME} is not there")
        golds = [str(row["answer"]) for row in rows]
    for changes, expected in ((RESPELLED, True), (MUTATED, False)):
        asked = [(f"Answer: ${other}$", gold) for gold in golds for other in sorted(changed(gold, changes))]
        assert len(asked) > 4 * len(golds) and wrongly_graded(*zip(*asked), expected) == []

def pairs(table, sign):
    """(answer, gold) of each `answer SIGN gold`; two spaces or a line end between them."""
    return [pair.split(f" {sign} ") for pair in re.split(r"\s\s+|\n", table.strip())]

def accepted(pair):
    """Is "answer -> gold" accepted? Compared as in a worker, but in this process."""
    try:
        return ev.equal(*map(ev.normalise, pair.split(" -> ")))
    except Exception:  # not read, so not equal
        return False

def test_no_rule_without_an_example_that_fails_without_it(monkeypatch):
    for kind, rules in ev.RULES.items():
        for rule in rules:
            _, _, example, near_miss = rule
            assert accepted(example) and not accepted(near_miss), rule
            with monkeypatch.context() as without:
                without.setitem(ev.RULES, kind, [other for other in rules if other != rule])
                assert not accepted(example), rule
    for table, name in ((ev.UNITS, "UNIT"), (ev.MISREAD, "IS_MISREAD")):
        for rule, *examples in table:
            *example, near_miss = examples
            whole, rest = ("|".join(p for p, *_ in table if p != left_out) for left_out in (None, rule))
            assert all(map(accepted, example)) and not accepted(near_miss), (rule, examples)
            with monkeypatch.context() as without:
                without.setattr(ev, name, re.compile(getattr(ev, name).pattern.replace(whole, rest)))
                assert accepted(near_miss) if table is ev.MISREAD else not accepted(example[0]), rule

EQUAL = r"""
055 -> 55  -8 -> -08  1,234 -> 1234  11,\!000 -> 11000  .75 -> 0.750  +6 -> 6  0.75 -> \frac34  25\% -> 0.25
\frac 38 -> \frac{3}{8}  1\frac{1}{4} -> 5/4  25\% -> 25%  \$7.50 -> 7.5  \text{blue} -> Blue  x=9 -> 9
9 -> x=9  2√3 -> 2\sqrt3  3π -> 3\pi  5sqrt(2) -> 5\sqrt{2}  \left(1,\,2\right) -> (1,2)  3, 8 -> 8, 3
[-1,4] -> -1 \le x \le 4  -1 \le x \le 4 -> [-1,4]  (t-2)(t+2) -> t^2-4  4x+6y=2 -> 2x+3y=1  12_{7} -> 12_7
0.333333333 -> \frac13  8 \text{ cm} -> 8  \boxed{8} -> 8  1.0\times10^{-4} -> 0.0001  x₁+x² -> x_1+x^2
\ln(xy) -> \ln x+\ln y  \sin^2 x+\cos^2 x -> 1  a_i -> a_{i}  2^\frac12 -> \sqrt2  \textcolor{red}{9} -> 9
\bm{16} -> 16  14 -> 14\text{ pages}  NO -> no  \frac{3\pm i\sqrt5}{2} -> \frac32 \pm \frac{\sqrt5}{2}i
66 2/3% -> 2/3  \pi r^2h -> \pi hr^2  Self-adjoint -> self-adjoint  1,200\% -> 12
10 km/h -> 10\text{ km per hour}  3 cm, 2 cm -> 2, 3  x<2 \text{ or } x>3 -> (-\infty,2)\cup(3,\infty)
x>1 and x<3 -> 1<x<3  x>1, x<3 -> (1,3)  5>x>1 -> 1<x<5  x<1 or x>3 -> |x-2|>1
x \le -2 \text{ or } 5 \le x -> x \in (-\infty,-2]\cup[5,\infty)  x<1, x>3 -> 3<x or x<1
x<0, 1<x<2, or x>3 -> (-\infty,0)\cup(1,2)\cup(3,\infty)  b<2 and a>1 -> a>1, b<2
2 hours, 30 minutes -> 2\text{ hours and }30\text{ minutes}  6 sq in -> 6\text{ in}^2
1 hour 5 minutes and 20 seconds -> 1 hr 5 min 20 s  (5,\infty)\cup[0,3) -> [0,3)\cup(5,\infty)
y = 4 and x=3 -> (3,4)  x=1,\ y=2,\ z=3 -> (1,2,3)  S = \{x \in \mathbb{R} : x<2\} -> (-\infty,2)
602\times 10^{21} -> 6.02\times 10^{23}  3 x 10^-4 -> 0.0003  \$2.5 million -> 2,500,000  \$1{,}250 -> 1250
24 sq. ft. -> 24\text{ ft}^2  24 feet squared -> 24 ft^2  \text{May }12 -> \text{May 12}  17 \& 19 -> 17, 19
x = 52_8 -> 52_8  58,500 -> n = 58500"""
UNEQUAL = r"""
42 or 43 != 42  $42$ or $43$ != 42  42, 43 != 42  42 (or 43) != 42  not 42 != 42  42 43 != 42  3 5 != 35
42 != -42  42.5 != 42  3.21 != 3.2100001  1/2^{99} != 1/2^{98}  (1/2^{99},0) != (1/2^{98},0)
\sqrt{10^{40}+1} != 10^{20}  6.74\times10^{-5} != .0000672  52 != 52_8  52_8 != 52  (2,1) != (1,2)
[1,2] != (1,2)  x=2 != y=2  0.33333 != 1/3  2k != 2k+1  \frac{1}{23} != \frac{1}{2}3  AB != ab  Ab != ab
4 h != 4  (3,4) != 3,4  (3,4) != \{3,4\}  1,2,2 != 1,1,2  7 million != 7  0.46 != 7/15  x<2, y<3 != y<2, x<3
7 millions != 7  7 halves != 7  Mgh != mgh  2mgH != 2mgh  mgH != mgh  7:20 AM != 7:20 PM
x \equiv 4 (mod 8) != x \equiv 4 \pmod 9  8 plus != 8  f(x) increases != f(x)  7 cm != 7\text{ m}
7 hours != 7 minutes  12 cm != 12\text{ inches}  7\text{ cents} != 7 dollars  7 miles != 7 minutes
8 cm^3 != 8\text{ cm}^2  [3,-1] != (3,-1)  2, 3 != (x, y) = (2, 3)  x>1 or x<3 != (1,3)
x<1 and x>3 != x<1 or x>3  x>1 and x<3 != x<1 or x>3  -2, 5 != -2<x<5  a>1 or b<2 != a>1 and b<2
x<1 or x>3 != y<1 or y>3  x<1 and x>3 != x<2 and x>5  2 hours 30 minutes != 230
2 hours 30 minutes != 30 hours 2 minutes  5 ft 3 in != 53  2, 30 != 2 hours 30 minutes
5 gallons 3 quarts != 53  5^\circ 3 != 53  €5 3 != 53  8 cm^2 != 8 cm  8 ft != 8\text{ square feet}
\$8 != 8 cents  8\text{ cubic m} != 8 m^2  8 m/s != 8 m/h  x=3, y=4 != (4,3)  x=3,x = 4 != (3,4)
a=3, b=4 != (3,4)  x=3 or y=4 != (3,4)  \{x : x<2\} != x>2  8 million != 8,000  10\% loss != 10\% gain
10\% losses != 10\% gains  10\%\text{ loss} != 10\%  10\% loss != 10  10% loss != 0.1  10\% gains != 10%"""
PERCENTAGES = r"""
10\% : 10  0.1  10%  1/10  10 percent  10\text{ percent}  x = 10\%  .10 : 1  1\%  0.1\%  100  10 cm
10 : 10\%  10 percent  \text{10\%}  10.0 % : 0.1  1\%  100\%  0.1\%  10\% loss
0.1 : 10\%  0.1\%  1/10  10 per cent : 1\%  100\%  10  1  0.01
12.5\% : 12.5  1/8  0.125  \frac{25}{2}\%  12\frac{1}{2}\%  25/2 : 1.25  12\%  125  1/2\%  13
33\frac{1}{3}\% : 33 1/3\%  1/3  100/3\%  33\frac13  \frac{100}{3} percent : 33\%  1/3\%  33  0.333  33/100
\frac{3}{4} : 75\%  75 percent  0.75  \frac{3}{4}\%  75.0\% : 75  7.5\%  \frac{4}{3}\%  34\%
150\% : 1.5  150  3/2  1\frac12 : 15  1.5\%  50\%  0.15  15000
-20\% : -20  -0.2  -20 percent  −20% : 20\%  -2  0.2  -2\%  20
1,200\% : 1200  12  1{,}200\%  1200 percent : 1.2  12\%  120  1,200,000
10\%, 25\% : 25\%, 10\%  10, 25  0.1, 1/4  10\% and 25\% : 10\%  10, 2.5  1\%, 25\%  10\%, 0.25\%
5\%\text{ per year} : 5\%  5  0.05  5% per year : 5\% per month  50\%  0.5  5\% losses
60 : 60\%  60 percent : 0.6  6\%  60\%\text{ gain}  600\%  60\%, 40\%"""

def test_equal_and_not_equal():
    same, other = pairs(EQUAL, "->"), pairs(UNEQUAL, "!=") + [("", "42")]
    for line in PERCENTAGES.strip().splitlines():  # gold : other spellings of it : other values
        gold, *tables = line.split(" : ")
        for found, table in zip((same, other), tables, strict=True):
            found += [(answer, gold) for answer in table.split("  ")]
    for those, expected in ((same, True), (other, False)):
        answers, golds = zip(*those)
        assert wrongly_graded([f"Answer: {answer}" for answer in answers], golds, expected) == []

@pytest.mark.skipif(not CASES.is_file(), reason=f"{CASES} is not there")
def test_cases_collected_from_other_graders():
    for expected in (True, False):
        cases = [case for case in ev.read_lines(CASES) if case["expected"] is expected]
        responses, golds = ([case[name] for case in cases] for name in ("response", "gold"))
        assert cases and wrongly_graded(responses, golds, expected) == []

def test_multiple_choice_by_exact_letter():
    right = "C  (C)  C)  C.  C) 14 m  (C) 14  \\text{C}  **C**  **C**: 5  C because  [C]  option C"
    wrong = "B  c  B or C  C) or B)  B, C  Carbon  14 m  [C] or [B]  option B"
    for text, gold in (("Answer: X", "C"), ("So \\boxed{X}", "\\text{(C)}")):
        for answers, expected in ((right, True), (wrong, False)):
            texts = [text.replace("X", answer) for answer in answers.split("  ")]
            assert wrongly_graded(texts, [gold] * len(texts), expected) == []

EXTRACTED = {  # text: what is taken as its answer
    "Answer: 4\nNo, wait.\nAnswer: 5": "5", "\\boxed{4}\nAnswer: 5": "5", "Answer: 4\nso \\boxed{5}": "5",
    "\\boxed{5}, then \\boxed{unbalanced": "5", "\\boxed{5}\nAnswer:": "5", "\\boxed{\\{5\\}}": "\\{5\\}",
    "\\boxed{\\frac12}": "\\frac12", "## Final Answer: $5$": "5", "\\boxed{2},\\quad\\boxed 3": "2, 3",
    "$\\boxed{2}$ and $\\boxed{3}$": "2 and 3", "\\[\\boxed{2}\\]\n\\[\\boxed{3}\\]": "2, 3",
    "\\boxed{5}\n\n\\boxed{5}": "5", "\\boxed{1}, \\boxed{2}, and \\boxed{3}": "1, 2 and 3",
    "\\boxed{x<1}\\text{ or }\\boxed{x>3}": "x<1 or x>3", "\\boxed{\\boxed{5}}": "\\boxed{5}",
    "\\boxed{2} \\boxed{} \\boxed{3}": "3", "\\textbf{Answer: 5}": "5", "\\boxed4: \\boxed5": "5",
    "\\boxed{5} as in (\\1)": "5", "Correct answer: 5 ✅": "5", "Answer: The correct choice is **5**.": "5",
    "Answer: 5\nThat was it.": "5",
    "Answer: $\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}$\nso": "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    "Answer: the value is not 5": "the value is not 5", "Answer: $5.00\nand $x$ is free": "5.00",
    "Answer: 5</s>": "5", "Answer: 5<｜end▁of▁sentence｜>": "5", "The result is 5": None, "": None,
    "\\boxed{3}\\boxed{}": None, "answered: 5": None, "Answer: \n": None, "Answer: **": None}

def test_where_the_answer_is():
    for text, answer in EXTRACTED.items():
        verdict = ev.grade(text, "5")
        assert (verdict.answer, verdict.no_answer, verdict.truncated) == (answer, answer is None, False), text
        assert not verdict.correct or answer, text
    # a reference solution
    assert ev.grade("Answer: 1/2", "We find $x=\\boxed{3}$, so the answer is \\boxed{\\frac{1}{2}}.").correct
    assert ev.grade("\\boxed{3}, \\boxed{2}", "the roots $\\boxed{2}$ and $\\boxed{3}$").correct

def test_only_the_text_after_the_last_think_counts():
    cut = False, None, False, False, True, True, False
    for text, gold, *verdict in (
            ("<think>Answer: 5 \\boxed5</think>Answer: 6", "5", False, "6", False, False, True, False, False),
            ("<think>Answer: 5 \\boxed5</think>Answer: 6", "6", True, "6", True, False, True, False, False),
            ("the template's \\boxed{4}</think>Answer: 5", "5", True, "5", True, False, True, False, False),
            ("\\boxed{4}\nAnswer: 5", "5", True, "5", True, False, True, False, False),
            ("Answer: 4\n\\boxed{5}", "5", True, "5", False, True, True, False, False),
            ("<think> \\boxed{5} Answer: 5", "5", *cut),
            ("<think>a</think>\nAnswer: 5\n<think> again", "5", *cut)):
        assert ev.grade(text, gold) == tuple(verdict), text
    assert ev.grade("Answer: 5", "5", finished=False) == cut
    for tags in ("<seed:think> </seed:think>", "<thought> </thought>", "[THINK] [/THINK]",
                 "<|START_THINKING|> <|END_THINKING|>", "<|channel> <channel|>"):
        opening, closing = tags.split()
        assert ev.grade(f"{opening}\\boxed{{4}}{closing}{opening} {closing}Answer: 5", "5").correct
        assert ev.grade(f"{opening}\\boxed{{5}}", "5").truncated

@pytest.fixture
def workers(monkeypatch):
    """What a test starts and what it asks, recorded; no worker is there before."""
    found, start, ask = types.SimpleNamespace(started=[], asked=[]), subprocess.Popen, ev.ask_worker
    monkeypatch.setattr(ev, "IDLE_WORKERS", [])
    monkeypatch.setattr(ev.subprocess, "Popen",
                        lambda *a, **options: found.started.append(start(*a, **options)) or found.started[-1])
    monkeypatch.setattr(ev, "ask_worker", lambda pair: found.asked.append(pair) or ask(pair))
    yield found
    for worker in found.started:
        worker.communicate()  # the end of its input ends it

def test_hostile_answers_are_wrong_and_others_are_not_touched(workers):
    texts = ["[" * 10**6, "Answer: " + "(" * 300, "Answer: " + "9" * 10**6, "Answer: \\frac{1}{0}",
             "Answer: $9^{9^{9^9}}$", "Answer: \\sqrt{49}", "Answer: 14/2", "Answer: 8/2", "Answer: 21/3"] * 2
    one = ev.grade_all(texts, ["7"] * len(texts), workers=1)
    assert [v.correct for v in one] == [*[False] * 5, True, True, False, True] * 2
    assert len(workers.asked) == len({*workers.asked}) == 7  # each once, the longest not at all
    ended = [worker.returncode for worker in workers.started if worker.poll() is not None]
    assert ended == [-signal.SIGPROF] and len(workers.started) == 2  # killed, and replaced
    assert ev.grade_all(texts[5:9], ["7"] * 4, workers=3) == one[5:9]

def growth(work, n, measurable):
    """CPU time of work(4 n) over that of work(n), each the least of five; n grows until both can be seen. It
    is 4 where the work grows with n, and 16 where it grows with the square of n."""
    # timeit without garbage collection: one of all that torch has made would count for more than the work
    def seconds(n):
        return timeit.timeit(lambda: work(n), timer=time.process_time, number=1)
    while seconds(n) < measurable:
        n *= 2
    little, much = zip(*[(seconds(n), seconds(4 * n)) for _ in range(5)])
    return min(much) / min(little)

@pytest.mark.parametrize("head, middle, tail", [
    ("", "[", ""), ("", "\\boxed{", ""), ("", "{", "}"), ("Answer", " ", ""), ("", "*", ""),
    ("", "Answer:", ""), ("Answer: ", "9", ""), ("", "\\boxed{1} ", ""), ("", "<think>", ""),
    ("\\boxed{1}\\text{", " ", "")])
def test_time_grows_with_the_text_not_its_square(head, middle, tail):
    assert growth(lambda n: ev.grade(head + middle * n + tail * n, "7", False), 1000, 0.02) < 8

def test_a_long_value_is_not_asked_and_time_grows_with_the_responses(workers):
    long = "~" * 3900
    for text, gold in (("Answer: " + long, "7"), ("Answer: 7", long), ("\\boxed{" + long + "}", "7")):
        assert not ev.grade(text, gold).correct and not workers.started, text[:20]
    filler = "we find that the value of $x^2$ is \\frac{1}{2} so (a+b) = 3. Then { } answer " * 250
    numbers = itertools.count()  # new ones: nothing is remembered

    def work(n):
        texts = [f"{filler}{i}\nAnswer: \\frac{{{i}}}{{2}}" for i in itertools.islice(numbers, n)]
        assert len(texts[0]) > 19000 and len(ev.grade_all(texts, ["7"] * n, workers=1)) == n
    assert growth(work, 20, 0.05) < 8 and len(workers.started) == 1
    assert len(workers.asked) == next(numbers)  # each once

def test_grading_loads_neither_torch_nor_vllm_nor_opsdc():
    code = ("import sys, eval; print(eval.grade('Answer: $\\\\frac{2}{4}$', '0.5').correct, "
            "{'torch', 'vllm', 'opsdc', 'sympy'} & {*sys.modules})")
    found = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True, timeout=HANG)
    assert found.strip() == "True set()"

# ---- BENCHMARKS
def test_benchmarks_load_with_the_fields_of_the_hub(tmp_path):
    """Only options that begin with the right one are shuffled, which is the same each time."""
    gpqa = [{"Question": f"Which is {i}?", "Correct Answer": f"it is {i}\n", "Incorrect Answer 1": "red",
             "Incorrect Answer 2": "green", "Incorrect Answer 3": "blue"} for i in range(40)]
    mmlu = [dict(question=f"Which is {i}?", choices=["red", "green", f"it is {i}", "blue"], answer=2)
            for i in range(40)]
    math500 = dict(problem="1+1?", solution="\\boxed{2}", answer="2", level=3, unique_id="a/1.json")
    aime24, aime25 = dict(id=60, problem="p", answer="060", year="2024"), dict(problem="p", answer=70, id="0")
    found = {}
    for name, split, config, rows in (
            ("math500", "test", "default", [math500]), ("aime24", "train", "default", [aime24]),
            ("aime25", "test", "default", [aime25]), ("gpqa_diamond", "train", "gpqa_diamond", gpqa),
            ("mmlu", "test", "all", mmlu)):  # as the hub serves them: with the metadata of a README
        as_file(tmp_path / name, f"{split}.parquet", as_parquet(rows))
        as_file(tmp_path / name, "README.md", f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
                                              f"  - split: {split}\n    path: {split}.parquet\n---\n")
        found[name] = ev.load_benchmark(f"{name}={tmp_path / name}")
        assert found[name] == ev.load_benchmark(f"{name}={tmp_path / name}")
    assert found["math500"] == [dict(id="a/1.json", problem="1+1?", tools=None, answer="2", level=3)]
    assert [(p["id"], p["answer"]) for p in found["aime24"] + found["aime25"]] == [("60", "060"), ("0", "70")]
    for name, letters in (("gpqa_diamond", {*"ABCD"}), ("mmlu", {"C"})):
        assert {p["answer"] for p in found[name]} == letters and len({p["id"] for p in found[name]}) == 40
        for i, p in enumerate(found[name]):
            question, *lines = p["problem"].split("\n")
            assert question == f"Which is {i}?" and f"({p['answer']}) it is {i}" in lines
            assert {line[4:] for line in lines if line[:1] == "("} == {"red", "green", "blue", f"it is {i}"}

def test_problems_are_loaded_with_ids_levels_and_answers(tmp_path, capsys):
    def load(*lines, wrapper="math"):
        return ev.load_benchmark(as_file(tmp_path, "mine.jsonl", "\n".join(lines)), wrapper)

    row = '{"problem": "a", "answer": 3%s}'
    leveled = row % ', "level": 1.50'  # 32 times: how verl's aime-2024.parquet repeats problems
    choices = '{"question": "a", "choices": "[\\"x\\", \\"y\\"]", "answer": "B"}'
    one, other = load(*[leveled] * 32, '{"problem": "a", "answer": 4}', '{"problem": "b"}', choices)
    assert one == {"id": "0", "problem": "a", "tools": None, "answer": "3", "level": "1.5"}
    assert other["answer"] == "B" and [one] == load(leveled, wrapper="none")
    assert "35 rows, 3 problems, 1 without a known answer, 1 given again with a" in capsys.readouterr().out
    same = row % ', "id": 1'
    assert [p["id"] for p in load(same, same.replace('"a"', '"b"'))] == ["1, row 1", "1, row 2"]
    for line, message in (("", "expected a field answer, final_answer or solution, found none"),
                          ('{"problem": "a"}', "expected a field answer, .* found none"),
                          (row % ', "id": ["1"]', "row 1, unique_id, id or level: expected a text"),
                          (row % ', "level": {}', "row 1, unique_id, id or level: expected a text")):
        assert re.search(message, refusal(lambda: load(line)))
    assert re.match("math501: expected math500, .*mmlu", refusal(lambda: ev.load_benchmark("math501")))
    assert re.search("hub page.*gpqa_diamond=DIR", refusal(lambda: ev.load_benchmark("gpqa_diamond=/absent")))

# ---- GENERATION
def test_the_id_that_ended_a_response_is_no_text():
    """Whatever the tokenizer calls it. Of a truncated response nothing is dropped."""
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["[STOP]"])  # not special, so it is decoded as text
    ids, stop, eos = tokenizer.encode("Answer: 7"), *tokenizer.encode("[STOP]"), tokenizer.eos_token_id
    for end, finished, text in (([stop], True, "Answer: 7"), ([eos], True, "Answer: 7"),
                                ([stop], False, "Answer: 7[STOP]"), ([stop, stop], True, "Answer: 7[STOP]"),
                                ([], False, "Answer: 7")):
        found, = ev.make_records(tokenizer, [dict(prompt=ids, gold="7")], [(ids + end, None, finished)])
        assert (found["response"], found["correct"]) == (text, finished and text == "Answer: 7")
        assert found["tokens"] == len(ids + end)

def test_records_read_think_blocks_opened_by_the_template():
    """Several samples, one seed each; what an engine would sample is given by hand."""
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def records(expected):
        problem = dict(id="p", problem="a1 b3", answer="4", level=None)
        jobs = ev.make_jobs(tokenizer, [problem], 4, seed=5)
        other, = ev.make_jobs(tokenizer, [problem | dict(answer="5")], 1, seed=6)
        assert jobs[0]["seed"] != other["seed"] and jobs[0]["problem_hash"] != other["problem_hash"]
        assert len({job["seed"] for job in jobs}) == 4 and len({str(job["prompt"]) for job in jobs}) == 1
        outputs = [([*encode(text), tokenizer.eos_token_id], None, True) for text in expected]
        found = ev.make_records(tokenizer, jobs, outputs)
        assert [(r["correct"], r["truncated"]) for r in found] == [*expected.values()]
        return found

    tokenizer, thought = toy_tokenizer(), "<think> 3 </think>"
    right, wrong, cut = (True, False), (False, False), (False, True)  # correct, truncated
    plain = records({thought + "\nAnswer: 4": right, thought + "\nAnswer: 5": wrong, "Answer: 4": right,
                     "<think> Answer: 4": cut})
    assert [r["think_tokens"] for r in plain] == [
        *[len(encode(thought))] * 2, 0, len(encode("<think> Answer: 4")) + 1]
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    opened = records({"3 </think>\nAnswer: 4": right, thought[:7] + "</think>\nAnswer: 4": right,
                      "Answer: 4": cut, "4": cut})
    assert [r["seed"] for r in plain] == [r["seed"] for r in opened]
    assert ev.summarise(opened)["accuracy"] == 0.5
    # another family's tags, special tokens, opened by the template; the last closing one counts
    tokenizer.add_special_tokens({"additional_special_tokens": ["<seed:think>", "</seed:think>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>", "<seed:think>")
    seed = records({"3 </seed:think>\nAnswer: 4": right, "Answer: 4": cut, "4": cut,
                    "3 </think> Answer: 4 </seed:think>\nAnswer: 5": wrong})
    answer = len(encode("\nAnswer: 4")) + 1
    assert [r["answer_tokens"] for r in seed] == [answer, 0, 0, answer]

# ---- STATISTICS
def record(problem, sample, correct, tokens, level=None, **more):
    """What eval.py's statistics need of a response; two tokens follow its think block."""
    return dict(id=problem, problem_hash=ev.short_hash(problem), level=level, sample=sample, correct=correct,
                answer_only=correct, boxed_only=False, either_full_text=correct, truncated=False,
                no_answer=False, tokens=tokens, think_tokens=tokens - 2, answer_tokens=2) | more

def test_summary_against_values_worked_out_by_hand():
    found = ev.summarise([
        record("a", 0, True, 10, 1), record("a", 1, False, 30, 1), record("b", 0, True, 20, 2),
        record("b", 1, True, 40, 2), record("c", 0, False, 60, 2, no_answer=True),
        record("c", 1, False, 80, 2, truncated=True)])
    levels = found.pop("levels")
    assert found == pytest.approx(dict(
        # errors of the problems' means, 0.5, 1, 0 and 20, 30, 70: their samples may depend
        problems=3, samples=2, accuracy=0.5, accuracy_se=0.5 / math.sqrt(3), answer_only=0.5, boxed_only=0,
        either_full_text=0.5, truncated=1 / 6, no_answer=1 / 6, think_tokens=38, answer_tokens=2, tokens=40,
        tokens_se=math.sqrt(700 / 3), tokens_median=35, tokens_correct=70 / 3))
    assert levels["1"]["accuracy"] == 0.5 and levels["2"]["tokens"] == 50

def test_paired_bootstrap():
    rng, base, ours, changes = random.Random(2), [], [], []
    for i in range(100):  # length varies 100-fold between problems; every problem is halved, give or take 2 %
        length, p = 10 ** rng.uniform(2, 4), rng.random()
        base += [record(str(i), j, rng.random() < p, length) for j in range(4)]
        ours += [record(str(i), j, rng.random() < p, length * rng.uniform(0.49, 0.51)) for j in range(4)]
        changes.append(sum(b["correct"] - a["correct"] for a, b in zip(base[-4:], ours[-4:])) / 4)
    found = ev.paired(base, ours)
    value, low, high = found["reduction"]  # pairing takes the spread out
    assert low < value < high and value == pytest.approx(0.5, abs=0.01) and high - low < 0.01
    change, low, high = found["change"]
    width = 1.96 * statistics.stdev(changes) / 10  # what the normal approximation says
    assert change == pytest.approx(statistics.fmean(changes)) and low < change < high
    assert (high - low) / 2 == pytest.approx(width, rel=0.1)
    assert ev.paired(base, base) == {"reduction": (0, 0, 0), "change": (0, 0, 0)}
    assert ev.paired(base, ours[::-1]) == found  # matched by problem, not by position
    assert "0 records with no samples" in refusal(lambda: ev.summarise([]))
    assert "on the same problems" in refusal(lambda: ev.paired(base, ours[4:]))
    nothing, something = ([record("a", 0, True, tokens)] for tokens in (0, 9))
    assert "no tokens at all" in refusal(lambda: ev.paired(nothing, something))

# ---- COMPARING RUNS
def fake_run(folder, shorter=1.0, problems=30, name="math500", finished=True, **settings):
    """Writes an evaluation of three levels, the easier the more shortened."""
    rng = random.Random(3)
    records = [record(f"p{i}", j, rng.random() < 0.9 - 0.1 * (i % 3),
                      round(rng.uniform(900, 1100) * (1 + i % 3) * shorter ** (3 - i % 3)), 1 + i % 3)
               for i in range(problems) for j in range(2)]
    as_file(folder, f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    settings = dict(version=ev.VERSION, model="m", instruction=None, seed=0, max_tokens=9, top_k=20,
                    temperature=0.6) | settings
    ev.write_summary(folder, settings, {name: records}, finished)
    return str(folder)

def test_compare_prints_a_table_and_draws_a_picture(tmp_path, capsys):
    runs = [fake_run(tmp_path / "base"), fake_run(tmp_path / "ours", 0.8, model="out/model"),
            fake_run(tmp_path / "more", 0.7, model="out2/model", instruction="c", seed=1)]
    ev.main(["compare", *runs, "--plot", str(tmp_path / "x.png")])
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[:2] for line in lines[2:]] == [[run, level] for run in runs[1:] for level in ("all", *"123")]
    records = [ev.read_run(run)[1]["math500"] for run in runs]
    means, shares = ([ev.mean(of_run, name) for of_run in records] for name in ("tokens", "correct"))
    assert lines[2][6].startswith(f"{100 * (1 - means[1] / means[0]):.1f} [")
    reductions = [float(line[6].split()[0]) for line in lines[3:6]]
    assert reductions[0] > reductions[1] > reductions[2] > 15  # easy problems were shortened more
    assert is_picture(tmp_path / "x.png")
    ax, = ev.pyplot().gcf().axes  # through the runs in their order, all and by level
    assert len(ax.containers) == 4 and ax.containers[0][0].get_xdata().tolist() == pytest.approx(means)
    assert ax.containers[0][0].get_ydata().tolist() == pytest.approx([100 * share for share in shares])
    assert [note.get_text().strip() for note in ax.texts] == ["base", "ours", "more", *"123"]

def test_compare_refuses_runs_that_differ_or_lack_something(tmp_path):
    base, cut, broken = (fake_run(tmp_path / name) for name in ("base", "cut", "broken"))
    *lines, last = Path(base, "math500.jsonl").read_text().splitlines(keepends=True)
    as_file(Path(cut), "math500.jsonl", "".join(lines))
    as_file(Path(broken), "math500.jsonl", "".join([*lines[:3], "{oops\n", *lines[4:], last]))
    refused = {"59 records with 1 or 2 samples": cut, "math500.jsonl, line 4": broken,
               "with its summary.json, found: .*No such file": str(tmp_path / "absent")}
    for message, change in (("temperature is 0.6 and 1.0", dict(temperature=1.0)),
                            ("max_tokens is 9 and 50; top_k", dict(max_tokens=50, top_k=1)),
                            ("math500 has problems in the first only: 1, in the second only: 0, for "
                             "example p29", dict(problems=29)),
                            ("math500.*aime24", dict(name="aime24")), ("version 0", dict(version=0)),
                            ("not finished", dict(finished=False))):
        refused[message] = fake_run(tmp_path / message[:9], **change)
    for message, run in refused.items():
        with pytest.raises(SystemExit, match=message):
            ev.main(["compare", base, run, "--plot", str(tmp_path / "x.png")])
        assert not (tmp_path / "x.png").exists()

# ---- PICTURES
def test_curves_of_two_training_runs(tmp_path, monkeypatch):
    *_, out = whole_run(tmp_path)
    first, *rows = metrics_of(out)  # six steps, thetabar refreshed after every second one
    lines = [json.dumps(row) + "\n" for row in (first | dict(accuracy=None), *rows)]
    as_file(tmp_path, "metrics.jsonl", "".join(lines) + '{"step": 7, "lo')  # still writing
    command = ["curves", str(tmp_path), str(out), "--plot", str(tmp_path / "c.png")]
    ev.main(command)
    drawn = [line.get_xdata() for line in ev.pyplot().gcf().axes[0].lines]
    assert [(len(x), x[0]) for x in drawn] == [(6, 1), (2, 2.5), (2, 4.5)] * 2
    assert is_picture(tmp_path / "c.png")
    with pytest.raises(SystemExit, match="absent/metrics.jsonl"):
        ev.main(["curves", "absent", *command[3:]])
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        ev.main(command)

# ---- TOKENS
def read_page(path):
    """A page of `eval.py tokens`: of each response its tokens' d, p, q, best and text; the table's rows."""
    def unescaped(fields):
        return [html.unescape(field) for field in fields]
    page = path.read_text()
    span = r"<span style=\S+ data-d=(\S+) data-p=(\S+) data-q=(\S+) data-best='([^']*)'>([^<]*)</span>"
    responses = re.findall("(?s)<pre>(.*?)</pre>", page)
    return ([[*map(unescaped, re.findall(span, response))] for response in responses],
            [unescaped(re.split("<t[hd]>", row)[1:]) for row in re.findall("<tr>(.*)", page)])

def test_page_of_tokens_sums_to_the_loss_that_the_trainer_logged(tmp_path):
    model, data, out = whole_run(tmp_path)
    page = tmp_path / "page.html"
    launch("eval.py", "tokens", "--model", model, "--data", data, "--samples", 6, "--max_prompt_tokens", 512,
           "--max_response_tokens", 24, "--out", page)
    responses, _ = read_page(page)
    means = [statistics.fmean(float(d) for d, *_ in tokens) for tokens in responses]
    assert statistics.fmean(means) == pytest.approx(metrics_of(out)[0]["loss"], abs=1e-6)
    assert ["".join(text for *_, text in tokens) for tokens in responses[:4]] == [
        row["response"] for row in ev.read_lines(out / "samples.jsonl")[:4]]

def test_page_of_given_responses_with_another_teacher(tmp_path, no_group, monkeypatch):
    """A line of a run and a record of an evaluation: what looks like HTML stays text, a character of several
    tokens whole, and the numbers are those of float64."""
    def show(teacher, *rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        ev.show_tokens(ev.token_options([*map(str, command), str(teacher)]))

    monkeypatch.setattr(opsdc, "DTYPE", torch.float32)  # on a GPU too
    words = *opsdc.INSTRUCTIONS.values(), "<think>\n" * 99  # or the template's goes unseen
    paths = [make_model(tmp_path / str(seed), "llama", words, seed=seed) for seed in range(2)]
    tokenizer, file = AutoTokenizer.from_pretrained(paths[0]), tmp_path / "rows.jsonl"
    command = ["--data", file, "--given", "--model", paths[0], "--max_prompt_tokens", 512,
               "--max_response_tokens", 99, "--loss_chunk", 7, "--out", tmp_path / "page.html", "--teacher"]
    texts = ["</span></pre><script>alert('&amp;')</script>\r\n \"é😀\"<|im_end|>", "Answer: 4<|im_end|>"]
    first, job = dict(problem="1 < 2 & 3?", response=texts[0], finished=True), dict(problem="2+2?", gold="4")
    for teacher, row, message in (
            (paths[1], job, "row 2: expected a line of samples.jsonl"),
            (paths[1], first | dict(response="no " * 3000), "the model's context, 2048 tokens, found"),
            (make_model(tmp_path / "2", "llama", vocabulary=300), job, "expected the tokens of")):
        assert message in refusal(lambda: show(teacher, first, row))
    problems = opsdc.make_problems(opsdc.Config(data=str(file)), opsdc.open_base(str(paths[0]), False),
                                   opsdc.INSTRUCTIONS["v1"])
    job["prompt"] = problems[1].student
    record, = ev.make_records(tokenizer, [job], [(tokenizer.encode(texts[1]), None, True)])
    assert record["response"] == "<think>\nAnswer: 4"
    show(paths[1], first, record)

    def quoted(token):
        return json.dumps(tokenizer.decode([token]), ensure_ascii=False)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths]
    (responses, rows), parts = read_page(tmp_path / "page.html"), collections.defaultdict(float)
    assert "&#39;" in (tmp_path / "page.html").read_text()  # which an attribute of a token may hold
    for problem, text, tokens in zip(problems, texts, responses, strict=True):
        ids = tokenizer.encode(text)
        p, q = (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].softmax(-1)
                for model, prompt in zip(models, (problem.student, problem.teacher)))
        exact = exact_divergence(p.log(), q.log(), "reverse_kl")
        assert "".join(piece for *_, piece in tokens) == text
        for y, nats, p_v, q_v, (*numbers, best, _) in zip(ids, exact.tolist(), p, q, tokens, strict=True):
            names, chances = zip(*re.findall(r'("(?:\\.|[^"\\])*") ([^,]+)', best))
            likeliest = q_v.topk(3)
            assert list(names) == [quoted(v) for v in likeliest.indices.tolist()]
            d, *found = map(float, [*numbers, *chances])
            assert d == pytest.approx(nats, rel=1e-4)
            assert found == pytest.approx([p_v[y].item(), q_v[y].item(), *likeliest.values.tolist()], 6e-3)
            parts[quoted(y)] += nats / len(ids)
    assert rows[0][0] == "token" and len(rows) == 21
    times = Counter(quoted(y) for text in texts for y in tokenizer.encode(text))
    for name, count, _, share, _ in rows[1:]:
        assert int(count) == times[name]
        assert float(share) == pytest.approx(100 * parts[name] / sum(parts.values()), abs=0.06)

# ---- EVALUATION
def test_an_evaluation_is_refused_before_the_engine_starts(good, refused_early, tmp_path):
    unanswered = as_file(tmp_path, "x.jsonl", '{"problem": "x"}')
    huge = as_file(tmp_path, "huge.jsonl", json.dumps(dict(problem="x " * 3000, answer=1, id="huge")))
    longest = len(opsdc.prompt_ids(AutoTokenizer.from_pretrained(good["model"]), "What is 39 + 39?"))
    args, _ = ev.parse_args(["--model", "m"])
    assert (args.samples, args.temperature, args.top_p, args.top_k) == (8, 0.6, 0.95, 20)
    assert "arguments: --samp 3" in refusal(lambda: ev.parse_args(["--model", "m", "--samp", "3"]))
    for change, message in (
            (dict(data=unanswered), "expected a field answer, .* found none"),
            (dict(instruction="short"), "--instruction short: expected v1"),
            (dict(samples=0), "--samples 0: expected more than 0"),
            ({"vllm-tp": 2}, "--vllm_tp 2: expected a divisor of the number of ranks"),
            ({"max-tokens": 2049 - longest},
             f"prompt of problem 39 has {longest} tokens, .*lower --max-tokens {2049 - longest}"),
            (dict(data=huge), "prompt of problem huge has .* tokens.*leave that problem out")):
        args, _ = ev.parse_args(evaluation(good, tmp_path / "out", **change))
        assert re.search(message, refusal(lambda: ev.evaluate(args)))
        assert not (tmp_path / "out").exists()
        torch.distributed.destroy_process_group()

def test_an_evaluation_keeps_its_folder(good, one_rank, tmp_path, monkeypatch):
    out, copy = tmp_path / "out", tmp_path / "copy"

    def prepare(out=out, **change):
        return ev.prepare_evaluation(ev.parse_args(evaluation(good, out, **change))[0])
    _, told, *_, cfg = prepare(out=tmp_path / "told", **{"vllm-memory": 0.3, "instruction": "v1"})
    assert cfg.vllm_memory == 0.3
    _, jobs, settings, *_ = prepare()
    for a, b in zip(jobs["rows"], told["rows"], strict=True):
        assert a["prompt_hash"] != b["prompt_hash"] and a["problem_hash"] == b["problem_hash"]
    assert "where no other process is at work, found: " in refusal(prepare)  # the first is: this process
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    ev.write_summary(out, settings, {}, finished=False)
    shutil.copytree(good["model"], copy)
    assert prepare(model=copy)[2] == settings | dict(model=str(copy))
    spoil_weights(copy, lambda weights: weights | {
        "model.norm.weight": weights["model.norm.weight"] * 1.01})  # trained further: another model
    for change, name in ((dict(temperature=0.9), "temperature"), (dict(instruction="v2"), "instruction"),
                         (dict(wrapper="none"), "wrapper"), (dict(model=copy), "model_hash")):
        assert f"holds another run ({name}: there" in refusal(lambda: prepare(**change))
    theirs = as_file(tmp_path, "theirs/rows.jsonl", "mine\n")
    assert "expected a new or empty folder" in refusal(lambda: prepare(out=Path(theirs).parent))

def test_a_second_benchmark_joins_and_no_table_lacks_a_record(good, no_group, refused_early, tmp_path,
                                                              monkeypatch, capsys):
    def evaluate(data):  # its records are there, none of which an engine made
        args, _ = ev.parse_args(evaluation(good, out, data=data))
        opsdc.start_processes()
        base, jobs, *_ = ev.prepare_evaluation(args)
        (name, those), = jobs.items()
        ids = base.tokenizer.encode("Answer: 2")
        records = ev.make_records(base.tokenizer, those, [(ids, None, True)] * len(those))
        as_file(out, f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        torch.distributed.destroy_process_group()
        ev.evaluate(args)
        torch.distributed.destroy_process_group()
        return ev.read_summary(out)

    def lose(text):  # a record between the start and the table
        if "samples are left to make" in text:
            file.write_text(file.read_text().partition("\n")[2])
    out, other = tmp_path / "out", write_rows(tmp_path / "other.jsonl", 7)
    file = out / "other.jsonl"
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    first, both = evaluate(good["data"]), evaluate(other)
    assert list(both["benchmarks"]) == ["rows", "other"] and both["finished"]
    assert both["benchmarks"]["rows"] == first["benchmarks"]["rows"]
    table = capsys.readouterr().out
    assert re.search(r"(?m)^\| in %, or tokens +\| rows +\| other +\|$", table)
    assert re.search(r"(?m)^\| problems +\| 40 +\| 7 +\|$", table)
    monkeypatch.setattr(ev, "say", lose)
    assert "1 of 14 samples of other have no record; repeat the" in refusal(lambda: evaluate(other))
    assert "| in %" not in capsys.readouterr().out
    after = ev.read_summary(out)
    assert not after["finished"] and after["benchmarks"] == both["benchmarks"]

FEW = 300  # problems: more samples a rank than the engine takes at a time, so that they end bit by bit

def die_evaluating(*arguments):
    """Worker: eval.py whose rank 1 is killed when it comes to its second records: the first are written."""
    if os.environ["RANK"] == "1":
        inject(ev, "make_records", lambda call: call == 2, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    ev.main(list(arguments))

def test_eval_end_to_end_killed_resumed_compared(tmp_path):
    """Of two ranks one is killed; one rank goes on to the records of a run that was always on one."""
    toy, base, whole = toy_of(tmp_path), tmp_path / "base", tmp_path / "whole"
    lines = (toy / "eval.jsonl").read_text().splitlines(keepends=True)[:FEW]
    problems = [json.loads(line) for line in lines]
    options = ["--data", as_file(tmp_path, "few.jsonl", "".join(lines)), "--samples", 2, "--max-tokens", 60,
               "--temperature", 1, "--block", 8, "--model", toy / "model", "--out"]
    launch(die_evaluating, *options, base, ranks=2, fails=-9)
    parts = [base / f"few.rank-{rank}.jsonl" for rank in (0, 1)]
    before = [line for part in parts if part.is_file() for line in part.read_text().split("\n")[:-1]]
    assert 8 <= len(before) < 2 * len(problems) and not ev.read_summary(base)["finished"]
    with open(parts[1], "a") as file:
        file.write('{"id": "half a li')
    model = shutil.copytree(toy / "model", tmp_path / "copy [1]")  # where vLLM finds no weights, or these
    save_file({name: 0 * w for name, w in load_file(model / "model.safetensors").items()},
              model / "consolidated.safetensors", metadata=dict(format="pt"))
    for more in ([base], [whole, "--block", 1000, "--model", model]):
        said = launch("eval.py", *options, *more)
        assert "| few" in said and "\r" not in said  # bars are for those who watch

    files = [base / "few.jsonl", whole / "few.jsonl"]
    after, records = files[0].read_text().splitlines(), ev.read_lines(files[0])
    assert set(before) < set(after) and not any(map(Path.exists, parts))  # nothing was made twice
    first, second = map(ev.read_summary, (base, whole))
    assert first["finished"] and first["benchmarks"]["few"] == json.loads(json.dumps(ev.summarise(records)))
    if not torch.cuda.is_available():  # where the rounding depends on what is computed together
        assert files[0].read_bytes() == files[1].read_bytes()
        assert first == second | {"settings": second["settings"] | {"model": str(toy / "model")}}
    assert ([(r["id"], r["sample"]) for r in records]
            == [(str(p.get("id", i)), j) for i, p in enumerate(problems) for j in (0, 1)])
    assert len({r["seed"] for r in records}) == len(records)
    assert len({r["prompt_hash"] for r in records}) == len({p["problem"] for p in problems})
    for r, p in zip(records[::2], problems):
        assert r["gold"] == str(p["answer"]) and r["tokens"] == r["think_tokens"] + r["answer_tokens"] <= 60
        assert (r["finish_reason"] == "length") <= r["truncated"]
        assert r["correct"] == ev.grade(r["response"], r["gold"], r["finish_reason"] == "stop").correct
    said = launch("eval.py", "compare", base, whole, "--plot", tmp_path / "x.png")
    assert f"| {whole}" in said and is_picture(tmp_path / "x.png"), said
    written = [file.read_bytes() for file in (files[0], base / "summary.json")]
    said = launch("eval.py", *options, base, "--temperature", 0.9, "--instruction", "v2", fails=True)
    assert "temperature: there 1.0, here 0.9; instruction" in said
    assert written == [file.read_bytes() for file in (files[0], base / "summary.json")]

# ------------------------------------------------------------------------------------------------ 5. COMMANDS

# ---- QUICKSTART
def quickstart(directory="toy"):
    """From nothing to a compared model, by the commands a user would type; what is there already is kept."""
    toy = Path(os.path.relpath(directory, HERE))  # the commands are run beside the scripts
    evaluate = (f"torchrun --nproc_per_node 2 eval.py --data {toy}/eval.jsonl {' '.join(TOY_EVAL)} "
                f"--model {toy}")
    tokens = (f"python eval.py tokens --data {toy}/eval.jsonl --instruction v2 --max_prompt_tokens 256 "
              f"--max_response_tokens 192 --teacher {toy}/model --model {toy}")
    steps = [  # what it does, command, what it leaves
        ("a tiny reasoning model that overthinks sums, made from scratch: 1 to 3 minutes",
         f"python test_opsdc.py toy {toy}", "eval.jsonl"),
        ("OPSDC: it learns to reason as if v2 stood in its prompt: 1 to 2 minutes",
         f"torchrun --nproc_per_node 2 opsdc.py --model {toy}/model --data {toy}/train.jsonl --out {toy}/run "
         + " ".join(TOY_RUN), "run/model"),
        ("the model before: half a minute", f"{evaluate}/model --out {toy}/base", ""),
        ("the model before, with v2 in its prompt: half a minute",
         f"{evaluate}/model --instruction v2 --out {toy}/concise", ""),
        ("the trained model, without an instruction: half a minute",
         f"{evaluate}/run/model --out {toy}/ours", ""),
        ("the three side by side: seconds",
         f"python eval.py compare {toy}/base {toy}/concise {toy}/ours --plot {toy}/compare.png", ""),
        ("what the loss sees before, token by token, as a page: seconds",
         f"{tokens}/model --out {toy}/tokens-before.html", ""),
        ("and after: seconds", f"{tokens}/run/model --out {toy}/tokens-after.html", "")]
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
    print(f"\ndone: see {toy}/compare.png, {toy}/tokens-before.html and {toy}/tokens-after.html")

# ---- FORKS
# README says whose ideas these are. A fork is a list of (what stands in opsdc.py once, what takes its place).
WEIGHT = "# a fork multiplies `weights` here by factors of the entropies or divergence, as constants"
FORKS = {
    "egrsd": [(WEIGHT, "weights = weights * torch.exp(-teacher_entropy).clamp(min=0.1)")],
    "tip": [(WEIGHT, "weights = weights * ((student_entropy > 0.1) | (divergence > 0.1))")],
    "paced": [
        ("    epochs = {", "    positions = [k // 4 for k in positions]\n    epochs = {"),
        ("    return [[1 / (len(rollouts) * len(r.ids))] * len(r.ids) for r in rollouts]",
         "    p = {k.index: fmean(r.correct for r in rollouts if r.index == k.index) for k in rollouts}\n"
         "    return [[p[r.index] * (1 - p[r.index]) / (len(rollouts) * len(r.ids))] * len(r.ids)\n"
         "            for r in rollouts]")],
    "ema": [  # in float32, since bfloat16 would round a hundredth away
        ("p.detach().to(dtype or DTYPE, copy=True)", "p.detach().clone()"),
        ("    due = cfg.refresh_every and step % cfg.refresh_every == 0\n"
         "    return snapshot(model) if due else thetabar",
         "    theta = snapshot(model)\n"
         "    return {name: q.lerp(theta[name], 0.01) for name, q in thetabar.items()}")],
    "larger": [  # of the same tokenizer
        ("    theta = snapshot(model, torch.float32)\n    copy_into(model, thetabar)\n",
         "    model = larger  # a module of its own, never swapped\n"),
        ("    copy_into(model, theta)\n", ""),
        ("    done = load_newest",
         "    other = open_base('Qwen/Qwen3-14B', True)\n"
         "    other.loaded = read_weights(other) if dist.get_rank() == 0 else None\n"
         "    globals()['larger'] = load_model(other, device, cfg)\n    done = load_newest")],
    "clip": [  # such an entry has no gradient either
        ("    return value, p * (a - (p * a).sum(-1, keepdim=True))",
         "    terms = p * a\n"
         "    value, a = terms.clamp(max=0.05).sum(-1), (terms < 0.05) * (a + 1)\n"
         "    return value, p * (a - (p * a).sum(-1, keepdim=True))")],
    "wandb": [  # begun before the engine, as a missing login would end the run after a step
        ("import torch\n", "import torch\nimport wandb\n"),
        ("    engine = RolloutEngine(base, cfg)",
         "    if dist.get_rank() == 0:\n        wandb.init(project='opsdc', config=asdict(cfg))\n"
         "    engine = RolloutEngine(base, cfg)"),
        ("    shown = [", "    wandb.log(metrics, step=metrics['step'])\n    shown = ["),
        ("    os._exit(status)", "    wandb.finish(status)\n    os._exit(status)")],
    "validate": [  # every tenth step, the weights before it
        ("        begun = time.perf_counter()\n",
         "        if step % 10 == 1:\n"
         "            benchmark = evaluator.load_benchmark('math500')\n"
         "            jobs = engine.share(evaluator.make_jobs(base.tokenizer, benchmark, 2, cfg.seed))\n"
         "            prompts, seeds = [job['prompt'] for job in jobs], [job['seed'] for job in jobs]\n"
         "            samples = engine.generate(prompts, seeds, max_tokens=cfg.max_response_tokens,\n"
         "                                      **evaluator.SAMPLING)\n"
         "            records = engine.gather(evaluator.make_records(base.tokenizer, jobs, samples))\n"
         "            for level, part in evaluator.grouped(records, 'level').items():\n"
         "                for name in ('correct', 'tokens'):\n"
         "                    metrics[f'eval_{name}_{level}'] = evaluator.mean(part, name)\n"
         "        begun = time.perf_counter()\n")],
    "sigterm": [
        ("import shutil\n", "import shutil\nimport signal\n"),
        ("    skipped = idle = 0", "    terminated = torch.zeros(())\n"
         "    signal.signal(signal.SIGTERM, lambda *_: terminated.fill_(1))\n    skipped = idle = 0"),
        ("        if step % cfg.save_every == 0 or step == cfg.steps:\n",
         "        dist.all_reduce(terminated, op=dist.ReduceOp.MAX)  # all after the same step\n"
         "        if terminated or step % cfg.save_every == 0 or step == cfg.steps:\n"),
        ("        if cfg.export_every and",
         "        if terminated:\n            sys.exit()\n        if cfg.export_every and")],
}

def fork(names, file, *more_patches):
    """Writes opsdc.py with the forks of these names, joined by +, to `file`, to be run in its place."""
    names, source = names.split("+") if names else [], (HERE / "opsdc.py").read_text()
    if unknown := set(names) - FORKS.keys():
        sys.exit(f"expected names of {', '.join(FORKS)}, joined by +; found {', '.join(unknown)}")
    for old, new in [patch for name in names for patch in FORKS[name]] + list(more_patches):
        assert source.count(old) == 1, f"{names}: opsdc.py has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    Path(file).write_text(source)
    print(f"wrote {file}, to be run in place of opsdc.py")

def load_fork(name, directory):
    """The forked opsdc.py as a module."""
    fork(name, directory / "forked.py")
    spec = importlib.util.spec_from_file_location("forked", directory / "forked.py")
    module = sys.modules["forked"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.mark.parametrize("name", ["egrsd", "tip", "clip"])
def test_forks_of_the_objective(name, tmp_path):
    """Loss and gradients equal float64: for `clip` with entries on both sides of its bound, for the others on
    tokens whose entropies go from nothing to log V."""
    hs, ws, ht, wt, weights = objective_inputs(N=60, apart=0.2 if name == "clip" else 0.004)
    scale = torch.ones(60, 1) if name == "clip" else torch.linspace(0, 12, 60)[:, None]
    inputs = [(hs * scale).requires_grad_(), ws.requires_grad_(), ht * scale, wt, weights]
    loss, _ = load_fork(name, tmp_path).distill_loss(*inputs)
    loss.backward()
    hs64, ws64, ht64, wt64, weights = (x.detach().double() for x in inputs)
    log_p = (hs64.requires_grad_() @ ws64.requires_grad_().T).log_softmax(-1)
    log_q = (ht64 @ wt64.T).log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    student_entropy, teacher_entropy = (-(x.exp() * x).sum(-1).detach() for x in (log_p, log_q))
    if name == "clip":
        assert 0.01 < (terms > 0.05).sum() / (terms > 0.01).sum() < 0.9
        terms = terms.clamp(max=0.05)
    else:
        factor = dict(egrsd=(-teacher_entropy).exp().clamp(min=0.1),
                      tip=(student_entropy > 0.1) | (terms.detach().sum(-1) > 0.1))[name]
        assert len(factor.unique()) > 1
        weights = weights * factor
    exact = (weights * terms.sum(-1)).sum()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5 if name == "clip" else 1e-4)
    for x, exact in zip(inputs[:2], (hs64, ws64)):
        assert relative_error(x.grad, exact.grad) < (1e-5 if name == "clip" else 1e-3)

def test_fork_paced_weighs_four_rollouts_a_problem_by_their_pass_rate(tmp_path):
    forked = load_fork("paced", tmp_path)
    batch = forked.batch_at(10, 0, 8, seed=0)
    assert batch == [batch[0]] * 4 + [batch[4]] * 4 and batch[0] != batch[4]
    rollouts = [forked.Rollout(i, [5] * 7, [-1.0] * 7, True, correct)
                for i, correct in zip(batch, [True, False, False, False] + [True] * 4)]
    expected = [[3 / 16 / 8 / 7] * 7] * 4 + [[0] * 7] * 4
    assert forked.token_weights(rollouts) == [pytest.approx(weights) for weights in expected]

def test_fork_ema_moves_thetabar_a_hundredth_of_the_way(good, one_rank, tmp_path):
    forked = load_fork("ema", tmp_path)
    forked.DTYPE = torch.bfloat16  # as on a GPU, where thetabar would be rounded
    model = loaded(good["model"], forked)
    thetabar = forked.snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for name, q in forked.refresh(model, thetabar, 1, forked.Config()).items():
        assert torch.allclose(q.full_tensor(), thetabar[name].full_tensor() + 0.01, atol=1e-6)

def test_fork_larger_learns_from_a_model_of_another_shape(good, one_rank, tmp_path):
    forked = load_fork("larger", tmp_path)
    forked.DTYPE, forked.MAX_GAP = torch.float32, ANY_GAP
    path = make_model(tmp_path / "m", hidden_size=96, num_hidden_layers=3, seed=1)
    forked.larger, model = loaded(path, forked), loaded(good["model"], forked)
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(path))
    batches = forked.make_micro_batches(rollouts, problems, device_of(model), forked.Config())
    hidden, head = forked.teacher_pass(model, None, batches)
    found = forked.student_pass(model, batches, hidden, head, forked.Config())["loss"]
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
                        for folder in (good["model"], path))
    assert found == pytest.approx(exact_objective(student, teacher, problems, rollouts).item(), rel=1e-5)

def test_forks_together_in_a_real_run(tmp_path):
    """With a look at a benchmark before step 1; told to stop in step 2 of 9, it saves that and ends well."""
    model, data = small_files(tmp_path)
    data.write_text(data.read_text().replace("{", '{"level": 3, '))
    fork("paced+ema+egrsd+validate+sigterm", tmp_path / "fork.py", ("'math500'", repr(str(data))), (
        "        log_step(",
        "        step == 2 and signal.raise_signal(signal.SIGTERM)\n        log_step("))
    launch(tmp_path / "fork.py", *small_run(model, data, tmp_path / "out", steps=9, batch_size=8))
    assert (tmp_path / "out/checkpoint-2").exists() and not (tmp_path / "out/model").exists()
    assert ["eval_correct_3" in line for line in metrics_of(tmp_path / "out")] == [True, False]
    samples = ev.read_lines(tmp_path / "out/samples.jsonl")[:4]
    assert [len({row[name] for row in samples}) for name in ("problem", "response")] == [1, 4]

def test_a_mistake_of_a_fork_keeps_its_traceback_and_a_users_is_one_line(good, tmp_path):
    stand_in = ("import wandb\n", "sys.modules.pop('vllm', None)  # as before an engine is imported\n"
                "class wandb:\n"
                "    def finish(status):\n        print('wandb ends with', status, flush=True)\n")
    fork("wandb", tmp_path / "fork.py", stand_in)
    fork("wandb", tmp_path / "mistaken.py", stand_in, ("return tokenizer.apply", "return tokeniser.apply"))
    bad = altered(good["model"], tmp_path / "m")
    (bad / "chat_template.jinja").write_text("{{ raise_exception('the system only') }}")
    ours, theirs = (launch(tmp_path / file, *small_run(model, good["data"], tmp_path / "out"), fails=1)
                    for file, model in (("mistaken.py", good["model"]), ("fork.py", bad)))
    assert "NameError: name 'tokeniser' is not defined" in ours and "mistaken.py\", line" in ours
    assert "\nerror: the model's chat template fails on What is 0" in theirs and "Traceback" not in theirs
    for said in (ours, theirs):
        assert "chat template fails on What is 0" in said and said.endswith("\nwandb ends with 1\n")

# ---- CLAIMS
# The paper's, at toy scale: `python test_opsdc.py claims` trains and evaluates every row with three seeds, by
# the commands a user would type, and prints the tables. What is finished is not run again.
SEEDS = (0, 1, 2)
ONLY_HELP = "checks only help"  # rows of a second toy: without a further check that goes astray
M30 = "--refresh_every 30"      # half of the steps, as the paper's 50 of 100
CLAIMS = {  # row: options of opsdc.py after TOY_RUN, or None where nothing is trained; "told" is for eval.py
    "base": None, "base, told v1": None, "base, told v2": None,
    "frozen teacher": "", "M = 60 of 110 steps": "--steps 110 --refresh_every 60",
    "v1, frozen teacher": "--instruction v1", "v1, M = 30": f"{M30} --instruction v1",
    "M = 30": M30, "M = 30, told v2": None,
    "M = 15": "--refresh_every 15", "M = 6": "--refresh_every 6", "M = 1": "--refresh_every 1",
    "JSD": f"{M30} --divergence jsd", "forward KL": f"{M30} --divergence forward_kl",
    "rollouts cut at 25 %": f"{M30} --max_response_tokens 28",
    "temperature 0.5": f"{M30} --temperature 0.5", "temperature 1.5": f"{M30} --temperature 1.5",
    "correct only": f"{M30} --keep correct", "incorrect only": M30,
    f"{ONLY_HELP}: base": None, f"{ONLY_HELP}: frozen teacher": "", f"{ONLY_HELP}: M = 30": M30,
}
DRAWN = "frozen teacher"  # with an evaluation every 5 steps, for the picture
EASY_AND_HARD = {"easy": LEVELS[:2], "hard": LEVELS[2:]}

def toy_of_row(toy, row):
    return toy / "only-help" if ONLY_HELP in row else toy

def folder_of_row(toy, row, seed):
    return toy / "claims" / f"{re.sub('[^a-zA-Z0-9.]+', '-', row)}-{seed}"

def records_of_row(toy, row, seed):
    """Its records on eval.jsonl, once it is trained and evaluated."""
    trained, _, told = row.partition(", told ")
    folder, out = folder_of_row(toy, trained, seed), folder_of_row(toy, row, seed) / "eval"
    model, script = toy_of_row(toy, row) / "model", "opsdc.py"
    if CLAIMS[trained] is not None and not (folder / "run/model").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if trained in (DRAWN, "incorrect only"):
            script = folder / "fork.py"
        if trained == DRAWN:
            fork("validate", script, ("'math500'", repr(str(toy / "eval.jsonl"))), ("% 10 == 1", "% 5 == 1"),
                 ("**evaluator.SAMPLING", "temperature=1"))
        if trained == "incorrect only":
            fork("", script, ('cfg.keep == "all" or r.correct', "not r.correct"))
        launch(script, *TOY_RUN, *CLAIMS[trained].split(), "--model", model, "--data", toy / "train.jsonl",
               "--out", folder / "run", "--seed", seed, "--save_every", 1000, torchrun=True)
    if not (out / "summary.json").exists() or not ev.read_summary(out)["finished"]:
        launch("eval.py", "--model", model if CLAIMS[trained] is None else folder / "run/model", "--data",
               toy / "eval.jsonl", "--out", out, *TOY_EVAL, "--seed", seed,
               *["--instruction", told] * bool(told), torchrun=True)
    settings, records = ev.read_run(out)
    return records["eval"]

def entropy_over_training(toy, row, seeds):
    """Student's entropy, nats/token, mean of all seeds: first five steps -> last five."""
    runs = [metrics_of(folder_of_row(toy, row, seed) / "run") for seed in seeds]
    means = [statistics.fmean(line["student_entropy"] for run in runs for line in run[part] if "loss" in line)
             for part in (slice(5), slice(-5, None))]
    return f"{means[0]:.3f} -> {means[1]:.3f}"

def faults(records):
    """Of easy / hard sums: shares of all responses that are wrong, by fault, and of steps checked, in %;
    checks after a step's first."""
    columns = []
    for levels in EASY_AND_HARD.values():
        part = [record for record in records if record["level"] in levels]
        found = [fault(r["response"], r["problem"]) for r in part if not r["correct"]]
        lines = [LINE.search(line) for r in part for line in r["response"].split("\n")]
        words = [line[1] for line in lines if line]  # None for a step, else the kind of check
        steps, first = words.count(None), words.count("check")
        columns.append([f"{100 * found.count(name) / len(part):.1f}" for name in FAULTS]
                       + [f"{100 * first / max(1, steps):.0f}",
                          f"{(len(words) - steps - first) / max(1, steps):.2f}"])
    return [" / ".join(cells) for cells in zip(*columns)]

def claims(directory="toy", *seeds):
    toy, seeds = Path(directory).resolve(), [int(seed) for seed in seeds] or SEEDS
    toys = [made for made in ((toy, 0), (toy_of_row(toy, ONLY_HELP), 0, 0))  # folder, seed, going astray
            if not (made[0] / "eval.jsonl").exists()]
    jobs = [(row, seed) for seed in seeds for row in CLAIMS]
    jobs.sort(key=lambda job: "told" in job[0])  # these evaluate models that are trained by then
    with ThreadPoolExecutor(2) as pool:  # a core each
        list(pool.map(lambda made: launch("test_opsdc.py", "toy", *made, torchrun=True), toys))
        records = dict(zip(jobs, pool.map(lambda job: records_of_row(toy, *job), jobs)))

    def spread(values):
        of_seeds = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}" + of_seeds
    table, wrong = [], []
    for row in CLAIMS:
        names = f"{ONLY_HELP}: base" if ONLY_HELP in row else "base", row
        base, ours = ([r for seed in seeds for r in records[name, seed]] for name in names)
        tokens, right = ([[ev.mean(records[name, seed], column) for seed in seeds] for name in names]
                         for column in ("tokens", "correct"))
        (*_, whole), *parts = ev.contrast(base, ours)
        table.append([row, f"`{CLAIMS[row]}`" if CLAIMS[row] else "", spread([100 * x for x in right[1]]),
                      ev.in_percent(*whole["change"], sign="+"), spread(tokens[1]),
                      spread([100 * (1 - y / x) for x, y in zip(*tokens)]),
                      " / ".join(f"{100 * stats['accuracy']:.1f}" for _, _, stats, _ in parts),
                      " / ".join(f"{100 * versus['reduction'][0]:.0f}" for *_, versus in parts),
                      "" if CLAIMS[row] is None else entropy_over_training(toy, row, seeds)])
        wrong.append([row, *faults(ours)])
    print(f"{len(seeds)} seeds, mean ± standard deviation; in brackets the 95 % paired bootstrap interval "
          f"over {parts[0][1]['problems'] * len(parts)} problems, all seeds together\n")
    print(ev.markdown_table(["toy", "options", "accuracy, %", "change, points", "tokens", "reduction, %",
                             "accuracy at 3 / 4 / 5 / 6 terms", "reduction there", "entropy, nats/token"],
                            table))
    print("\nWhat wrong responses do wrong, % of all responses, easy / hard sums\n")
    print(ev.markdown_table(["toy", *FAULTS, "steps checked, %", "further checks a step"], wrong))

def picture(directory="toy", file="toy.png", *seeds):
    """Accuracy against mean tokens of easy and of hard sums, means of the seeds: on the way with a frozen
    teacher, and at the end of other rows."""
    toy, seeds = Path(directory).resolve(), seeds or SEEDS
    figure, ax = ev.pyplot().subplots(figsize=(9, 5.2), layout="constrained")
    refreshed = [row for row in CLAIMS if row.startswith("M = ") and "told" not in row]
    marks = {"o": ("before", ["base"]), "s": ("after (v2), told nothing", [DRAWN]),
             "D": ("after, teacher refreshed: at step 60 of 110; every 30, 15, 6, 1", refreshed),
             "*": ("before, told v1", ["base, told v1"]), "P": ("before, told v2", ["base, told v2"])}
    records = {row: [record for seed in seeds for record in records_of_row(toy, row, seed)]
               for _, rows in marks.values() for row in rows}
    runs = [[line for line in metrics_of(folder_of_row(toy, DRAWN, seed) / "run") if "eval_tokens_6" in line]
            for seed in seeds]
    for color, (name, levels) in zip(("tab:blue", "tab:red"), EASY_AND_HARD.items()):
        def place(row):
            part = [record for record in records[row] if record["level"] in levels]
            return ev.mean(part, "tokens"), 100 * ev.mean(part, "correct")
        way = [[scale * statistics.fmean(line[f"eval_{of}_{level}"] for line in lines for level in levels)
                for of, scale in (("tokens", 1), ("correct", 100))] for lines in zip(*runs)]
        ax.plot(*zip(place("base"), *way[1:], place(DRAWN)), ".-", color=color)
        ax.plot(*zip(*map(place, [DRAWN, *refreshed])), ":", color=color)
        for marker, (_, rows) in marks.items():
            ax.plot(*zip(*map(place, rows)), marker, color=color, markeredgecolor="white",
                    markersize=9 if marker == "D" else 14)
        ax.annotate(f"{name} sums", place("base"), (-100, -5), textcoords="offset points", color=color,
                    fontsize=15)
    labels = {marker: label for marker, (label, _) in marks.items()} | {".-": "every 5 steps in between"}
    for marker, label in labels.items():
        ax.plot([], [], marker, color="gray", markersize=11, label=label)
    ax.set_xlabel("mean tokens of a response", fontsize=14)
    ax.set_ylabel("right answers, %", fontsize=14)
    ax.tick_params(labelsize=13)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=13, loc="lower left")
    figure.savefig(file, dpi=100)
    print(f"wrote {file}")

# ---- FAMILIES AND DRILL
def families(*names):
    """The table of the README; in the order of FAMILIES, two at a time."""
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(partial(family_row, "out-families"), names or FAMILIES):
            rows.append(["" if x is None else f"{x:.0e}" if isinstance(x, float) else x
                         for x in row.values()])
            print(*rows[-1], sep=" | ", flush=True)
    print(ev.markdown_table(["family", "gap", "export", "remark", "s"], rows))

def drill(directory="out-drill"):
    """For every moment: of two ranks one dies; seconds until both are gone, what is left, the run resumed on
    one, two or three ranks."""
    directory = Path(directory)
    directory.mkdir()
    model, data = small_files(directory)
    launch("opsdc.py", *small_run(model, data, directory / "whole"), torchrun=True)
    print("| killed in | all gone after, s | left | resumed |\n|---|---|---|---|")
    moments = ("sync", "sample_rollouts", "grade_rollouts", "teacher_pass", "student_pass", "update",
               "log_step", "fsync")  # fsync: its shard is written, the checkpoint is not whole yet
    for ranks, moment in zip(itertools.cycle((1, 2, 3)), moments):
        arguments = small_run(model, data, directory / moment, save_every=1)
        _, seconds = killed_at(moment, arguments)
        left = ", ".join(sorted(path.name for path in (directory / moment).glob("*checkpoint-*")))
        launch("opsdc.py", *arguments, "--resume", ranks=ranks, torchrun=True)
        same_losses(directory / "whole", directory / moment)
        print(f"| {moment} | {seconds:.0f} | {left} | on {ranks}: equal |", flush=True)

# ---- BENCH AND GPU
VOCABULARY, HIDDEN = 151936, 1024  # of Qwen3-0.6B's head

def naive_loss(hs, ws, ht, wt, weights):
    """What one writes first: logits of all tokens in the inputs' dtype, autograd for the rest."""
    def log_probabilities(h, w):  # bfloat16 is rounded as by a GPU; a CPU's own bfloat16 kernels take minutes
        logits = h.float() @ w.float().T if h.dtype == torch.bfloat16 and not h.is_cuda else h @ w.T
        return logits.to(h.dtype).log_softmax(-1)
    log_p, log_q = log_probabilities(hs, ws), log_probabilities(ht, wt)
    return (weights * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()

def loss_in_float64(*inputs):
    """The loss and the head's gradient, 64 tokens at a time."""
    hs, ws, ht, wt, weights = (x.detach().double() for x in inputs)
    ws.requires_grad_()
    loss = 0.0
    for h, teacher_h, w in opsdc.split_together(64, hs, ht, weights):
        part = naive_loss(h, ws, teacher_h, wt, w)
        part.backward()
        loss += part.item()
    return loss, ws.grad

def peak_gib():
    """The most memory of this process: of a GPU if it uses one, else of the machine."""
    of_the_machine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated() or of_the_machine) / 2**30

def measure_objective(dtype, *shape):
    """Worker: what the loss and its gradients take beside their inputs, on a GPU or one thread; the errors of
    the loss and of the head's gradient. shape: N, V, d."""
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    N, V, d = map(int, shape)
    hs, ws, ht, wt, weights = objective_inputs(N, V, d, apart=0.013)
    hs, ht = (x * 6.4 / d**0.5 for x in (hs, ht))  # logits of size 3.2, so that the KL is 0.0017 nats/token
    hs, ws, ht, wt = (x.to("cuda" if cuda else "cpu", getattr(torch, dtype)) for x in (hs, ws, ht, wt))
    inputs = hs.requires_grad_(), ws.requires_grad_(), ht, wt, weights.to(hs.device)
    exact, exact_grad = loss_in_float64(*inputs)
    chunk = min(N, opsdc.Config().loss_chunk)

    def four_products():
        """The arithmetic that cannot be avoided: as much as of both logits and of both gradients."""
        h, w = (x.detach() if cuda else x.detach().float() for x in (hs, ws))
        logits = h.new_empty(chunk, V)
        for part in 4 * h.split(chunk):
            torch.mm(part, w.T, out=logits[:len(part)])
    methods = dict(four=four_products, naive=partial(naive_loss, *inputs),
                   distill_loss=lambda: opsdc.distill_loss(*inputs, chunk=chunk)[0])
    best, rows = {}, {}
    for name, compute in methods.items():
        seconds = []
        Path("/proc/self/clear_refs").write_text("5")  # the machine's peak is counted anew
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = peak_gib()
        for _ in range(3):  # the first is not counted: kernels are chosen and memory is asked for
            hs.grad = ws.grad = None
            start = time.perf_counter()
            loss = compute()
            if loss is not None:
                loss.backward()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        best[name] = min(seconds[1:])
        rows[name] = (f"{1000 * best[name]:.1f} ms, {best[name] / best['four']:.2f} x four, "
                      f"{peak_gib() - before:.2f} GiB")
        if loss is not None:
            rows[name] += (f", loss off by {abs(loss.item() / exact - 1):.1e}, head's gradient by "
                           f"{relative_error(ws.grad, exact_grad):.2%}")
    print(json.dumps(rows))

def measure_trainer(model_path, tokens, checkpointing):
    """Worker: seconds and memory of the trainer alone, in three steps on four random responses a rank of so
    many tokens; the first step is not counted."""
    device = opsdc.start_processes()
    world = torch.distributed.get_world_size()
    opsdc.MAX_GAP = ANY_GAP  # no engine to agree with
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    cfg = opsdc.Config()
    problems, _ = fixed_batch(tokenizer)
    rollouts = [opsdc.Rollout(0, ids, [-1.0] * len(ids), True)
                for ids in torch.randint(5, len(tokenizer), (4 * world, int(tokens))).tolist()]
    model = loaded(model_path, gradient_checkpointing=checkpointing == "on")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    thetabar = opsdc.snapshot(model)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        loss = opsdc.train_step(model, thetabar, optimizer, rollouts, problems, device, cfg)["loss"]
        seconds.append(time.perf_counter() - start)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({f"recomputation {checkpointing}": (
            f"{4 * world} x {tokens} tokens: {statistics.fmean(seconds[1:]):.2f} s, "
            f"peak {peak_gib():.1f} GiB, loss {loss:.6f}")}))

def measured(worker, *arguments, ranks=1):
    """The rows that a worker prints as JSON: on a GPU, or of a command, in a fresh process."""
    fresh = torch.cuda.is_available() or __name__ == "__main__"
    said = launch(worker, *arguments, ranks=ranks, torchrun=fresh)
    return json.loads(said.splitlines()[-1])

def sync_rows(model):
    """What the worker `measure_sync` finds on one GPU: gaps in nats/token, the largest of its tokens."""
    file = model.with_name("found.json")
    launch(measure_sync, model, file, 1, torchrun=True)
    (*_, fresh), (*_, sharp), stopped, (*_, stale), (*_, again), counts = json.loads(file.read_text())
    gaps = f"{fresh:.1e}, at temperature 0.05 {sharp:.1e}, stale {stale:.1e}, after a sync {again:.1e}"
    return {"largest gap": gaps, "stale weights": stopped, "sleep frees": f"{counts[2]:.1f} GiB"}

def run_rows(model, data, ranks):
    """Three steps of opsdc.py, and of several ranks again with one that fails in the third."""
    def seconds_from(moment, how):
        return killed_at(moment, small_run(model, data, model.with_name(how), steps=3, batch_size=4 * ranks,
                                           lr=1e-5, save_every=3, max_response_tokens=1024), ranks, how)[1]
    rows = {"normal end": f"{seconds_from('export', 'ends'):.1f} s after the export began"}
    for m in metrics_of(model.with_name("ends")):
        rows[f"step {m['step']}"] = (
            f"{m['seconds_step']:.2f} s, of it sampling {m['seconds_generate']:.2f}, "
            f"{m['tokens_per_second']:.0f} tokens/s, gap {m['logprob_gap']:.1e} "
            f"(largest {m['logprob_gap_max']:.1e})")
    if ranks > 1:
        rows["one rank fails"] = f"all gone after {seconds_from('teacher_pass', 'fails'):.1f} s"
    return rows

def print_parts(parts):
    """The table of the rows that the parts return. One that fails is a row that says so, and fails all."""
    failed = []
    print("| part | measured | |\n|---|---|---|")
    for part, rows_of_part in parts.items():
        try:
            rows = rows_of_part()
        except Exception as error:
            failed.append(part)
            rows = {"FAILED": re.sub(r"[\s|]+", " ", str(error))[-600:]}
        print("".join(f"| {part} | {name} | {value} |\n" for name, value in rows.items()), end="", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")

def bench(N=1024):
    print(f"N={N}, V={VOCABULARY}, d={HIDDEN}, a GPU or one thread, torch {torch.__version__}\n")
    print_parts({dtype: partial(measured, measure_objective, dtype, N, VOCABULARY, HIDDEN)
                 for dtype in ("float32", "bfloat16")})

def gpu(directory="out-gpu"):
    """What only a GPU can tell: at Qwen3-0.6B's shapes, with random weights, on every GPU of this machine."""
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU: nothing was measured")
    ranks = torch.cuda.device_count()
    print(f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n",
          flush=True)
    for lock in Path(directory).glob("*/opsdc.lock"):  # of a run of an earlier call
        shutil.rmtree(lock.parent)
    model, data = large(directory)
    print_parts({
        "objective": partial(measured, measure_objective, "bfloat16", 4096, VOCABULARY, HIDDEN),
        "trainer alone, on": partial(measured, measure_trainer, model, 2048, "on", ranks=ranks),
        "trainer alone, off": partial(measured, measure_trainer, model, 2048, "off", ranks=ranks),
        "engine and trainer": partial(run_rows, model, data, ranks),
        "weight sync": partial(sync_rows, model)})

def test_parts_of_the_gpu_command(tmp_path):
    """On a CPU all but the engine's, whose workers other tests here run; on a GPU the command."""
    if torch.cuda.is_available():
        return gpu(tmp_path)
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu(tmp_path)
    rows = measured(measure_objective, "bfloat16", 64, 400, 32)
    assert ["head's gradient by 0.1" in rows[name] for name in ("four", "naive", "distill_loss")] == [0, 0, 1]
    model = make_model(tmp_path / "model")
    with pytest.raises(SystemExit, match="^failed: broken$"):
        print_parts({name: partial(measured, measure_trainer, model, tokens, name)
                     for name, tokens in (("on", 16), ("broken", "no number"), ("off", 16))})

# ---- PROFILE
def large(directory="out-large"):
    """A random Qwen3 of the 0.6B's shape and 40 problems, to profile; vocabulary beyond its tokenizer's."""
    model = make_model(Path(directory) / "model", vocab_size=VOCABULARY, hidden_size=HIDDEN,
                       intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, initializer_range=0.02)
    return model, write_rows(model.with_name("rows.jsonl"))

def profile(*arguments):
    """opsdc.py with `arguments`, then where its seconds went."""
    profiler, sys.argv = cProfile.Profile(), ["opsdc.py", *arguments]
    profiler.runcall(opsdc.main)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(r"(opsdc|eval)\.py")

# ---------------------------------------------------------- 5. COMMANDS: THE README'S, AGAINST A STAND-IN HUB

# The commands are read from README.md and run as they stand there, by hub ids, in empty folders. A small
# server speaks the hub's interface; HF_ENDPOINT alone sends huggingface_hub, transformers, vLLM and datasets
# to it.
class Hub(BaseHTTPRequestHandler):
    """The hub for server.repositories, {"models/OWNER/NAME" or "datasets/OWNER/NAME": {path: content}}."""
    protocol_version = "HTTP/1.1"
    URL = re.compile(r"(?:/api)?/(?:(models|datasets)/)?([^/]+/[^/]+)"
                     r"(?:/(revision|tree|paths-info|resolve)/([^/]+)/?(.*))?")

    def do_GET(self):
        sent = parse_qs(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode())
        url = urlsplit(self.path)
        self.server.asked.append(self.path)
        parts = self.URL.fullmatch(url.path)
        kind, name, verb, revision, path = map(unquote, parts.groups("")) if parts else [""] * 5
        files = self.server.repositories.get(f"{kind or 'models'}/{name}")
        if files is None:
            return self.refuse("RepoNotFound")
        commit = hashlib.sha1(repr(files).encode()).hexdigest()
        if revision not in ("", "main", commit):
            return self.refuse("RevisionNotFound")
        if verb == "resolve":
            if path not in files:
                return self.refuse("EntryNotFound")
            etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'  # it names the file in the cache
            return self.send(files[path], **{"ETag": etag, "X-Repo-Commit": commit})
        items = {PurePosixPath(file): dict(
            type="file", path=file, size=len(content), oid=hashlib.sha1(content).hexdigest(),
            lfs=dict(oid=hashlib.sha256(content).hexdigest(), size=len(content), pointerSize=134))
            for file, content in files.items()}
        items |= {folder: dict(type="directory", path=str(folder), size=0, oid="0" * 40)
                  for file in items for folder in file.parents if folder.name}
        if verb == "tree":
            at, deep = PurePosixPath(path), "recursive=true" in url.query.lower()
            found = [items[file] for file in items if file.parent == at or deep and at in file.parents]
            return self.send(found) if found else self.refuse("EntryNotFound")
        if verb == "paths-info":
            wanted = map(PurePosixPath, sent["paths"])
            return self.send([items[file] for file in wanted if file in items])
        self.send(dict(id=name, sha=commit, siblings=[dict(rfilename=file) for file in files]))

    do_HEAD = do_POST = do_GET

    def refuse(self, code):
        self.send(dict(error=code), 404, **{"X-Error-Code": code})

    def send(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *_):
        pass

def hub_contents(model):
    """A tiny model and invented problems under the README's names, in the hub's layouts and schemas."""
    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    def card(name=None, split=None, path=None):  # YAML, of which JSON is a part
        configs = [dict(config_name=name, data_files=[dict(split=split, path=path)])]
        metadata = json.dumps(dict(license="mit") | (dict(configs=configs) if name else {}))
        return {"README.md": f"---\n{metadata}\n---\n".encode()}
    sums = [(f"What is {i} + {i + 7}?", str(2 * i + 7)) for i in range(24)]
    dapo = [dict(data_source="math_dapo", ability="MATH", extra_info=dict(index=f"{i:036}"),
                 prompt=[dict(content=opsdc.STUDENT_PREFIX + question + opsdc.SUFFIX, role="user")],
                 reward_model=dict(ground_truth=answer, style="rule-lighteval/MATH_v2"))
            for i, (question, answer) in enumerate(sums * 20)]
    math500 = [dict(problem=question, solution=f"$\\boxed{{{answer}}}$", answer=answer, subject="Algebra",
                    level=1, unique_id=f"test/algebra/{answer}.json") for question, answer in sums[:8]]
    aime24 = [dict(id=i, problem=question, solution="", answer=answer.zfill(3), url="", year="2024")
              for i, (question, answer) in enumerate(sums[8:12], 60)]
    aime25 = [dict(problem=question, answer=answer, id=str(i))
              for i, (question, answer) in enumerate(sums[12:16])]
    gpqa = ("Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID\n"
            + "".join(f'{question},"it is {answer}\n",red,green,blue,rec{answer}\n'
                      for question, answer in sums[16:20]))
    mmlu = [dict(question=question, subject="arithmetic", choices=["0", "1", "2", answer], answer=3)
            for question, answer in sums[20:]]
    weights = {path.name: path.read_bytes() for path in model.iterdir()} | card()
    return {
        **{f"models/Qwen/Qwen3-{size}": weights for size in ("1.7B", "8B")},
        "datasets/BytedTsinghua-SIA/DAPO-Math-17k": card() | {
            "data/dapo-math-17k.parquet": as_parquet(dapo)},
        "datasets/HuggingFaceH4/MATH-500": card() | {"test.jsonl": lines(math500)},
        "datasets/HuggingFaceH4/aime_2024": card("default", "train", "data/train-*") | {
            "data/train-00000-of-00001.parquet": as_parquet(aime24)},
        "datasets/math-ai/aime25": card() | {"test.jsonl": lines(aime25)},
        "datasets/Idavidrein/gpqa": card("gpqa_diamond", "train", "gpqa_diamond.csv") | {
            "gpqa_diamond.csv": gpqa.encode()},
        "datasets/cais/mmlu": card("all", "test", "all/test-*") | {
            "all/test-00000-of-00001.parquet": as_parquet(mmlu)}}

@contextlib.contextmanager
def stand_in_hub(contents, home):
    """The server, and the environment in which everything asks it and is kept in `home`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repositories, server.asked = contents, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HF_")}
        yield server, environment | dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
                                         HF_HOME=str(home), NO_PROXY="127.0.0.1")
        server.shutdown()

NOT_RUN = {  # how commands of the README begin that are not run here: why
    "python test_opsdc.py": "they have tests of their own, or take hours or GPUs",
    "python -m pytest": "it is what runs here",
    "python opsdc.py --model Qwen/Qwen3-0.6B": "it differs by numbers for which smaller ones are put here",
    "torchrun --nproc_per_node 8 eval.py --model out/model": "torchrun evaluates the base, python this model",
    "python eval.py compare eval-Qwen3-8B": "it needs the one before",
    "torchrun --nnodes": "it takes two machines"}
SMALLER = {  # what is added to the commands that contain these words
    "opsdc.py": "--steps 2 --batch_size 4 --max_response_tokens 16",
    "eval.py --": "--samples 1 --max-tokens 16",
    "eval.py tokens": "--max_response_tokens 16",
    "eval.py compare": "", "eval.py curves": ""}

def readme_commands():
    """[[command, ...], ...]: all that start with python or torchrun in README.md, in indented lines or
    backticks, but NOT_RUN. A list begins with a command that trains, as that needs a new --out."""
    readme = (HERE / "README.md").read_text().replace("\\\n", " ")
    blocks, left_out = [], set()
    for line, quoted in re.findall(r"(?m)^    (.+)|`([^`]+)`", readme):
        command = " ".join(re.sub(r"\s+#.*", "", line or quoted).split())
        reasons = {start for start in NOT_RUN if command.startswith(start)}
        left_out |= reasons
        if re.match("(python|torchrun) ", command) and not reasons:
            added, = (words for name, words in SMALLER.items() if name in command)
            if " opsdc.py" in command:
                blocks.append([])
            blocks[-1].append(f"{command} {added}")
    assert left_out == NOT_RUN.keys()
    return blocks

def in_python(*words, **options):
    """What `python WORDS` says: unlike a fork, a process that reads its environment when it imports."""
    done = subprocess.run([sys.executable, *map(str, words)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=HANG, **options)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout

def run_commands(commands_of):
    """Worker: {folder: commands} in JSON: runs the commands there; torchrun's ranks become two."""
    for folder, commands in json.loads(commands_of).items():
        os.chdir(folder)
        for words in map(shlex.split, commands):
            ranks, begin = (2, 3) if words[:2] == ["torchrun", "--nproc_per_node"] else (1, 1)
            print("$", *words, flush=True)
            print(launch(Path(words[begin]).resolve(), *words[begin + 1:], ranks=ranks), flush=True)

def hashes(*models):
    """Worker: {model: [hash, folder], or why it is refused}, as JSON in the last line."""
    def found(name):
        try:
            base = opsdc.open_base(name, True)
            return opsdc.model_hash(base), str(base.folder)
        except ValueError as error:
            return str(error)
    opsdc.start_processes()
    print("\n" + json.dumps({name: found(name) for name in models}))

def evaluated(out):  # {benchmark: number of problems}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"]
    return {name: found["problems"] for name, found in summary["benchmarks"].items()}

def test_a_hub_id_its_snapshot_and_a_copy_are_one_model(good, one_rank, tmp_path):
    files = {path.name: path.read_bytes() for path in Path(good["model"]).iterdir()}
    files |= {"additional_chat_templates/tools.jinja": b"{{ messages }}"}
    eos = files["generation_config.json"].replace(b'"eos_token_id": 1', b'"eos_token_id": [1, 2]')
    contents = {
        "models/org/model": files,
        "models/org/commit": files | {"README.md": b"a commit", "original/consolidated.safetensors": b"y",
                                      "training_args.bin": b"z"},
        "models/org/edited": files | {"generation_config.json": eos},
        "models/org/embedding": files | {"modules.json": b"[]"}}
    names = [name.removeprefix("models/") for name in contents]
    with stand_in_hub(contents, tmp_path / "home") as (_, online):
        said = in_python(HERE / "test_opsdc.py", "hashes", *names, env=online)
        found = json.loads(said.splitlines()[-1])
        said = in_python(HERE / "test_opsdc.py", "hashes", names[0], env=online | dict(HF_HUB_OFFLINE="1"))
    (first, snapshot), (commit, folder), (edited, _), embedding = (found[name] for name in names)
    assert first == commit != edited and Path(snapshot).name != Path(folder).name
    assert not [path for path in Path(folder).rglob("*") if path.suffix == ".bin" or "consol" in path.name]
    assert embedding.endswith("found: an embedding model")
    assert json.loads(said.splitlines()[-1]) == {names[0]: [first, snapshot]}
    assert hash_of(snapshot) == hash_of(shutil.copytree(snapshot, tmp_path / "copy")) == first

def test_commands_of_the_readme_by_hub_ids_then_offline(tmp_path):
    texts = 2 * [opsdc.STUDENT_PREFIX + opsdc.SUFFIX, *opsdc.INSTRUCTIONS.values()]  # prompts of 160 tokens
    model = make_model(tmp_path / "model", "qwen3", texts, 600, max_position_embeddings=40960)
    commands_of = {str(tmp_path / f"clone-{n}"): commands for n, commands in enumerate(readme_commands())}
    small, large = map(Path, commands_of)
    for clone in (small, large):
        shutil.copytree(model, clone / "toy/model")
        write_rows(clone / "toy/eval.jsonl")
        for name in ("opsdc.py", "eval.py"):
            shutil.copy(HERE / name, clone)
    with stand_in_hub(hub_contents(model), tmp_path / "home") as (hub, online):
        said = in_python(HERE / "test_opsdc.py", "run_commands", json.dumps(commands_of), env=online)
        assert said.count("480 rows, 24 problems") == 2
        for clone in (small, large):
            assert [line["loss"] > 0 for line in metrics_of(clone / "out")] == [True, True]
            config = json.loads((clone / "out/model/config.json").read_text())
            assert config["max_position_embeddings"] == 40960
        for run in (small / "eval-Qwen3-1.7B", small / "eval-model", large / "eval-Qwen3-8B"):
            assert evaluated(run) == dict(math500=8, aime24=4, aime25=4)
        assert evaluated(large / "eval-choice") == dict(gpqa_diamond=4, mmlu=4)
        assert is_picture(small / "out-compare.png") and is_picture(large / "out-curves.png")
        assert "What carries most of the loss" in (large / "toy/tokens.html").read_text()
        assert all(any(f"/{name.removeprefix('models/')}/resolve/" in path for path in hub.asked)
                   for name in hub.repositories)

        asked, offline = len(hub.asked), dict(env=online | dict(HF_HUB_OFFLINE="1"), cwd=small)
        train, evaluation, *_ = (shlex.split(command)[1:] for command in commands_of[str(small)])
        in_python(*train, "--resume", "--steps", 3, **offline)
        in_python(*evaluation, **offline)  # finds the same problems and model
        assert len(hub.asked) == asked
    assert [line["step"] for line in metrics_of(small / "out")] == [1, 2, 3]

# ---------------------------------------------------------------------------------------- 5. COMMANDS: MEMORY

# `memory` runs opsdc.py's own functions on fake CUDA tensors, which have shapes and no content, as rank 0 of
# a fake process group, and counts the storages that are alive. It needs a config.json, no weights, no GPU.
def qwen3(d, f, layers, heads, tied, vocabulary=VOCABULARY, head=128, kv_heads=8):
    return Qwen3Config(vocab_size=vocabulary, hidden_size=d, intermediate_size=f, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head,
                       tie_word_embeddings=tied, architectures=["Qwen3ForCausalLM"])

SHAPES = {  # the published ones, by name
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, True), "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, True), "Qwen3-8B": qwen3(4096, 12288, 36, 32, False),
    "Qwen3-14B": qwen3(5120, 17408, 40, 40, False), "Qwen3-32B": qwen3(5120, 25600, 64, 64, False),
    "R1-Distill-Llama-8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                                       num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)}

# Backward of fake CUDA tensors asks torch's C++ for an accelerator, which a build for CPUs does not have.
HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
"""

def simulations(*cases):
    """What `simulated` finds for each list of options, in a process whose torch believes in a GPU."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory, "hooks.so")
        hooks = {} if torch.version.cuda else dict(LD_PRELOAD=str(library))
        if hooks:
            compiler, home = shutil.which(os.environ.get("CXX", "c++")), Path(torch.__file__).parent
            if not compiler:
                sys.exit("error: torch built for CPUs needs a C++ compiler to simulate a GPU: install g++")
            subprocess.run([compiler, "-x", "c++", "-", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include",
                            f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-lc10", "-ltorch_cpu", "-o", library],
                           input=HOOKS, text=True, check=True)
        said = in_python(HERE / "test_opsdc.py", "simulate",
                         *(shlex.join(map(str, case)) for case in cases), env=ENVIRONMENT | hooks)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

PHASES = dict(load_model="load", distill_loss="loss", teacher_pass="teacher", forward="forward",
              student_pass="backward", update="update", refresh="refresh", training_state="save",
              checkpoint_weights="sync")  # by the first of these functions that is running

@functools.cache
def whose(file, function):
    """(owner, name) of a function on the stack: opsdc.py's, FSDP2's or transformers', or nobody's."""
    if file == opsdc.__file__ and not function.startswith("<"):
        return "opsdc", function
    if "_fully_shard" in file:
        return "library", function
    return ("library", "transformers") if "transformers" in file else ("", "")

TRAFFIC = collective_ops - sync_ops

# Operations that give one tensor, on the device of the first argument. FakeTensorMode takes five times as
# long to find this out as they take without content.
fake_tensor = torch._subclasses.fake_tensor
SIMPLE = {getattr(torch.ops.aten, name) for name in (
    "_unsafe_view", "add_", "copy_", "detach", "expand", "mm", "mul_", "permute", "select", "slice", "t",
    "transpose", "unsqueeze", "view")}

class Ledger(TorchDispatchMode):
    """The bytes of all living storages on a kind of device: who holds them, their peak in each phase, and the
    peak of each stream, for the allocator gives no stream what another one freed. And the work of a step:
    FLOPs, and the bytes that this rank receives in collectives."""

    def __init__(self, lm, device, fake=None):
        super().__init__()
        self.device, self.fake, self.block = device, fake, 512 if fake else 1
        self.head, self.sizes = lm.get_output_embeddings().weight.shape, {p.numel() for p in lm.parameters()}
        self.live, self.peaks, self.stream = {}, {}, None
        self.held, self.streams, self.highest, self.work = Counter(), Counter(), Counter(), Counter()

    @contextlib.contextmanager
    def counting(self):
        resize = torch.UntypedStorage.resize_

        def resize_(storage, n):  # FSDP2 frees by it, and no mode sees it
            resize(storage, n)
            if storage._cdata in self.live:
                self.resized(storage)
            return storage
        with mock.patch("torch.UntypedStorage.resize_", resize_), self:
            yield

    def place(self, shape):
        """The phase, and who will hold what is made now, by the functions on the stack."""
        frame, calls, library = sys._getframe(3), [], []
        while frame:
            owner, name = whose(frame.f_code.co_filename, frame.f_code.co_name)
            if owner == "opsdc":
                calls.append(name)
            elif owner == "library" and not calls:
                library.append(name)
            frame = frame.f_back
        phase = next((name for function, name in PHASES.items() if function in calls), "start")
        return phase, self.holder(phase, calls, library, shape)

    def holder(self, phase, calls, library, shape):
        V, matrix = self.head[0], len(shape) < 3 and math.prod(shape) in self.sizes
        if phase == "load":
            return "theta"
        if calls[:1] == ["snapshot"]:
            return "theta's copy" if phase == "teacher" else "thetabar"
        if phase == "loss":
            return "gradients" if shape == self.head else "logits" if V in shape else "hidden states"
        if phase in ("update", "sync"):
            return dict(update="Adam", sync="gathered weights")[phase]
        if library and "transformers" not in library[0]:  # FSDP2
            return "gradients" if any("reduce" in name for name in library) else "gathered weights"
        if phase == "teacher" and calls[0] == "teacher_pass":
            return "the teacher's head"
        if phase == "backward" and matrix:
            return "gradients"
        return "activations" if library or phase == "backward" else "hidden states"

    def size(self, n):
        return -(-n // self.block) * self.block

    def resized(self, storage, shape=()):
        """A storage is new, or FSDP2 has freed it or asked for it again."""
        key, n = storage._cdata, self.size(storage.nbytes())
        phase, holder = self.place(shape)
        if key not in self.live:
            self.live[key] = [0, holder, self.stream]
            weakref.finalize(storage, self.free, key).atexit = False
        before, holder, stream = self.live[key]
        self.live[key][0] = n
        self.held[holder] += n - before
        self.streams[stream] += n - before
        self.highest[stream] = max(self.highest[stream], self.streams[stream])
        total = sum(self.held.values())
        if total > self.peaks.get(phase, (0,))[0]:
            self.peaks[phase] = total, dict(self.held)

    def free(self, key):
        n, holder, stream = self.live.pop(key)
        self.held[holder] -= n
        self.streams[stream] -= n

    def keep(self, times, n):
        """As if `times` further storages of n bytes had been kept from the teacher's pass to the update."""
        n = times * self.size(n)
        self.highest[None] += n
        for phase in ("teacher", "forward", "loss", "backward"):
            total, held = self.peaks[phase]
            self.peaks[phase] = total + n, held | {"hidden states": held.get("hidden states", 0) + n}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.prim.device.default:  # half of all calls
            return arguments[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by next
        options = options or {}
        if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            check_product(*arguments)
        if self.fake and function is torch.ops.aten._local_scalar_dense.default:
            return 0.0  # of .item(): loss, gap and norm, which have no content
        if self.fake and function._overloadpacket in SIMPLE and self.counts(arguments[0]):
            with fake_tensor.in_kernel_invocation_manager(self.fake):
                result = function(*arguments, **options)
            if not isinstance(result, fake_tensor.FakeTensor):  # not an argument, changed in place
                result = fake_tensor.FakeTensor(self.fake, result, arguments[0].fake_device)
        else:
            result = function(*arguments, **options)
        for made in result if isinstance(result, tuple | list) else [result]:
            if (isinstance(made, torch.Tensor) and self.counts(made)
                    and made.untyped_storage()._cdata not in self.live):
                self.resized(made.untyped_storage(), made.shape)
        self.count(function, arguments, options, result)
        return result

    def counts(self, x):  # DTensor makes tensors of another fake mode, to find out a shape
        if not self.fake:
            return x.device.type == self.device
        return getattr(x, "fake_mode", None) is self.fake and x.fake_device.type == self.device

    def count(self, function, arguments, options, result):
        if flops := flop_registry.get(function._overloadpacket):
            shapes = [x for x in arguments if not isinstance(x, torch.dtype)]
            causal = "flash" in function.name()  # computes half of the pairs, counted in full
            self.work["FLOPs"] += flops(*shapes, **options, out_val=result) / (1 + causal)
        if self.fake and function in TRAFFIC:
            group = CollectiveOp.get_process_group(function, arguments)
            ranks = torch.distributed.get_process_group_ranks(group)
            n, local = len(ranks), int(os.environ["LOCAL_WORLD_SIZE"])
            size = CollectiveOp.get_comm_tensor_size(function, result, arguments, options) * (n - 1) / n
            name = re.sub(r"\W|_", "", function.name().split("::")[1])
            kind = next(k for k in ("allgather", "reducescatter", "allreduce", "broadcast") if k in name)
            where = "between nodes" if len({rank // local for rank in ranks}) > 1 else "in a node"
            self.work[f"{kind} {where}"] += size * (1 + (kind == "allreduce"))

def check_product(*arguments):
    """A GPU multiplies matrices of one dtype, and adds to another dtype only if told so; fake ones any."""
    kinds = [x.dtype for x in arguments if isinstance(x, torch.Tensor)]
    told = any(isinstance(x, torch.dtype) for x in arguments)
    assert len({*kinds[-2 if told else 0:]}) == 1, f"a product of {kinds}"

class Stub:  # a CUDA stream or event, whose methods do nothing
    def __init__(self, *arguments, **options):
        pass

    def __getattr__(self, name):
        return lambda *arguments, **options: self

def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that a GPU takes, for the model's queries, keys and values without a mask."""
    assert attn_mask is None and is_causal
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]

@contextlib.contextmanager
def fake_gpu(ledger):
    """torch.cuda for as long as opsdc.py computes with fake tensors."""
    make_mesh, main_stream = torch.distributed.init_device_mesh, Stub()
    fsdp = "torch.distributed.fsdp._fully_shard._fsdp_param_group"

    @contextlib.contextmanager
    def stream(now):
        before, ledger.stream = ledger.stream, now if now is not main_stream else None
        yield
        ledger.stream = before

    def init_device_mesh(*arguments, **options):
        with fake_tensor.unset_fake_temporarily():  # it reads ranks
            return make_mesh(*arguments, **options)
    kernels = torch.library.Library("aten", "IMPL")  # else silu's falls apart into many operations
    kernels.impl("silu_backward", lambda gradient, x: torch.empty_like(gradient), "CUDA")
    stubs = {"torch.cuda.Stream": Stub, "torch.cuda.Event": Stub, "torch.cuda.stream": stream,
             f"{fsdp}.record_function": contextlib.nullcontext,
             "torch.profiler.record_function": contextlib.nullcontext,
             "torch.cuda.current_stream": lambda *_: ledger.stream or main_stream,
             "torch.cuda.current_device": lambda: 0, "torch.cuda.get_device_capability": lambda *_: (9, 0),
             "torch.distributed.init_device_mesh": init_device_mesh,
             "torch.nn.functional.scaled_dot_product_attention": flash,
             "torch.distributed.tensor._sharding_prop.detect_fake_mode": lambda: None,  # a mode of its own
             "transformers.masking_utils.find_packed_sequence_indices": lambda *_: None}
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch(name, stub))
        yield stack.enter_context(torch.autograd.set_multithreading_enabled(False))

def longest_rollouts(cfg):
    """Rollouts that fill micro-batches as far as --micro_batch_tokens and the longest response allow."""
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    length = min(longest, cfg.micro_batch_tokens // -(-cfg.micro_batch_tokens // longest))
    length = length if cfg.micro_batch_tokens > longest else longest
    y = min(cfg.max_response_tokens, length - 1)
    prompt = [1] * (length - y)
    problems = [opsdc.Problem("", None, prompt, prompt)]
    return [opsdc.Rollout(0, [1] * y, [0.0] * y, True)] * cfg.batch_size, problems

def memory_steps(base, device, cfg, ledger, whole=False):
    """opsdc.py's main without engine and files: two steps, with a refresh after the second. Returns the bytes
    between steps. Unless `whole`, the first step, which makes Adam's state, has one micro-batch, and the
    second has two and a smaller last one. Each further one does and receives what the second did, and adds
    to the memory only its teacher's hidden states."""
    model = opsdc.load_model(base, device, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    thetabar = opsdc.snapshot(model)
    for step in (1, 2):
        before, ledger.work = ledger.work, Counter()
        for name, weight in opsdc.checkpoint_weights(model.lm, opsdc.DTYPE):
            del weight
        batches = opsdc.make_micro_batches(*longest_rollouts(cfg), device, cfg)
        n = len(batches[0].tokens)
        smaller = [batch for batch in batches[2:] if len(batch.tokens) < n]
        some = batches if whole else [*batches[:step], *smaller]
        opsdc.student_pass(model, some, *opsdc.teacher_pass(model, thetabar, some), cfg)
        opsdc.update(model, optimizer, cfg)
        further = len(batches) - len(some)
        del batches, smaller, some
        thetabar = opsdc.refresh(model, thetabar, 1 - step % 2, dataclasses.replace(cfg, refresh_every=1))
        opsdc.training_state(model, optimizer, thetabar)
    ledger.work.update({name: further * n for name, n in (ledger.work - before).items()})
    ledger.keep(further, n * model.lm.config.hidden_size * opsdc.DTYPE.itemsize)
    gc.collect()
    return dict(+ledger.held)  # without those that hold nothing

def simulated(*options):
    """Of `--model M --gpus N --nodes K` and opsdc.py's options -> what `memory` prints, in bytes."""
    parser = argparse.ArgumentParser(prog="memory", epilog="and opsdc.py's options")
    parser.add_argument("--gpus", type=int, default=1, help="of a node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="all micro-batches: slower, the same figures")
    place, rest = parser.parse_known_args(options)
    cfg, = HfArgumentParser(opsdc.Config).parse_args_into_dataclasses(rest)
    config = copy.deepcopy(SHAPES.get(cfg.model)) or AutoConfig.from_pretrained(cfg.model)
    world = place.gpus * place.nodes
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(place.gpus))
    from torch.testing._internal.distributed.fake_pg import FakeStore  # the import registers a backend
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with FakeTensorMode() as fake:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(opsdc.text_config(config), dtype=torch.float32)
        loaded = AutoModelForCausalLM.from_config(empty.config, dtype=torch.float32)
        ledger = Ledger(empty, "cuda", fake)
        with fake_gpu(ledger), ledger.counting():
            base = opsdc.Base(cfg.model, None, config, None, "", empty, loaded)
            idle = memory_steps(base, torch.device("cuda", 0), cfg, ledger, place.whole)
    formula = opsdc.training_bytes(empty, dataclasses.asdict(cfg))
    torch.distributed.destroy_process_group()
    return dict(place=f"{cfg.model} on {place.nodes} x {place.gpus}", peaks=ledger.peaks, idle=idle,
                pools=sum(ledger.highest.values()), formula=formula, flops=ledger.work.pop("FLOPs"),
                received=ledger.work, parameters=sum(p.numel() for p in empty.parameters()),
                settings=dataclasses.asdict(cfg))

def simulate(*cases):
    """Worker: `simulated`, as JSON, for each case."""
    with mock.patch("torch.cuda.is_available", lambda: True):
        importlib.reload(opsdc)
    gc.freeze()
    for case in cases:
        print(json.dumps(simulated(*shlex.split(case))), flush=True)

ASLEEP = 4e9  # of an engine that sleeps, with CUDA's contexts and NCCL's buffers; an estimate, 3 to 4 GB

def memory(*options):
    """Prints what a GPU holds, phase by phase, and which cards are enough."""
    print("counting: about 20 seconds, and two more for each layer of the model ...", flush=True)
    print(*reported(*simulations(options)), sep="\n")

def reported(found):  # in lines
    def listed(bytes_of):
        return ", ".join(f"{name} {n / 1e9:.2f}" for name, n in bytes_of.items() if n > 5e6)
    peaks, settings, idle = found["peaks"], found["settings"], sum(found["idle"].values())
    highest, held = max(peaks.values(), key=lambda peak: peak[0])
    yield (f"{found['place']} GPUs, {settings['batch_size']} rollouts, micro-batches of "
           f"{settings['micro_batch_tokens']} tokens; GB a GPU, simulated, the peak of each phase:")
    yield listed({phase: n for phase, (n, _) in peaks.items()})
    yield f"The highest is held by: {listed(held)}"
    yield f"Between steps: {listed(found['idle'])}"
    yield (f"The allocator, which keeps a pool for each stream, takes up to {found['pools'] / 1e9:.2f} GB; "
           f"the estimate at the start of a run: {found['formula'] / 1e9:.2f}")
    weights = 2 * found["parameters"] / settings["vllm_tp"]
    for card in (24e9, 48e9, 80e9, 141e9):
        fits = found["pools"] + ASLEEP <= card
        share = min(0.95, (card - max(idle, peaks["sync"][0]) - ASLEEP / 4) / card)
        verdict = "yes" if share * card > 1.15 * weights else (
            f"with a larger --vllm_tp, for weights of {weights / 1e9:.1f} GB")
        yield f"{card / 1e9:.0f} GB: " + (f"{verdict}, --vllm_memory up to {share:.2f}" if fits else "no")
    yield (f"Beside an engine that sleeps in {ASLEEP / 1e9:.0f} GB, an estimate. A step of a GPU computes "
           f"{found['flops'] / 1e12:.0f} TFLOP and receives, in GB: {listed(found['received'])}")

# name: model, GPUs of a node, nodes, replicas, options. Of some of the small models' weights 8 and 16 divide
# the rows, of others they do not.
SMALL_SHAPES = {"tied": qwen3(72, 100, 2, 3, True, vocabulary=1003, head=24, kv_heads=1),
                "untied": qwen3(72, 100, 2, 3, False, vocabulary=1003, head=24, kv_heads=1),
                "large": qwen3(1024, 3072, 2, 16, True)}
SMALL = "--max_prompt_tokens 64 --max_response_tokens 64 --loss_chunk 32 --micro_batch_tokens"
COUNTED = {
    "one GPU": ("tied", 1, 1, 1, f"{SMALL} 128 --batch_size 2"),
    "two nodes": ("tied", 8, 2, 1, f"{SMALL} 128 --batch_size 32 --no_gradient_checkpointing"),
    "a replica a node": ("tied", 8, 2, 2, f"{SMALL} 384 --batch_size 160"),
    "the same, whole": ("tied", 8, 2, 2, f"{SMALL} 384 --batch_size 160 --whole"),
    "eight GPUs": ("untied", 8, 1, 1, f"{SMALL} 128 --batch_size 16"),
    "not recomputed": ("untied", 8, 1, 1, f"{SMALL} 128 --batch_size 16 --no_gradient_checkpointing"),
    "large": ("large", 1, 1, 1, "--batch_size 3 --max_response_tokens 1024 --micro_batch_tokens 2048")}

@pytest.fixture
def counts(tmp_path):
    """{name: what the simulator finds} of COUNTED, through every branch for CUDA."""
    if not torch.version.cuda and not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("torch built for CPUs needs a C++ compiler to simulate a GPU")

    def make(folder):
        for name, config in SMALL_SHAPES.items():
            config.save_pretrained(folder / name)
        found = simulations(*(["--model", folder / model, "--gpus", gpus, "--nodes", nodes, "--replicas",
                               replicas, *options.split()]
                              for model, gpus, nodes, replicas, options in COUNTED.values()))
        (folder / "found.json").write_text(json.dumps(dict(zip(COUNTED, found, strict=True))))
    return json.loads((shared(tmp_path, "counts", make) / "found.json").read_text())

def by_hand(config, shards):
    """Bytes of rank 0: its state between steps, gradients, theta put aside, the teacher's head. FSDP2 gives
    it the first rows of each weight, as many as any rank has, padded where there are fewer. Each is a block
    of the allocator, of 512 bytes or a multiple; the gradients of a decoder layer share one."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    V, d = lm.lm_head.weight.shape

    def blocks(sizes):
        return sum(-(-int(n) // 512) * 512 for n in sizes)
    shard = {name: -(-len(p) // shards) * p[0].numel() for name, p in lm.named_parameters()}
    groups = Counter()
    for name, n in shard.items():
        groups[re.sub(r"(layers\.\d+).*", r"\1", name)] += n
    float32 = blocks(4 * n for n in shard.values())
    return {"theta": float32 + blocks(4 * buffer.numel() for buffer in lm.get_decoder().buffers()),
            "Adam": 2 * float32 + 512 * len(shard),  # and a count of steps for each weight
            "thetabar": blocks(2 * n for n in shard.values()),
            "gradients": blocks(4 * n for n in groups.values()),
            "theta's copy": float32, "the teacher's head": blocks([2 * -(-V // shards) * shards * d])}

@pytest.mark.parametrize("name", COUNTED)
def test_state_and_gradients_are_the_hand_count_to_the_byte(name, counts):
    model, gpus, nodes, replicas, _ = COUNTED[name]
    at = {phase: held for phase, (_, held) in counts[name]["peaks"].items()}
    found = counts[name]["idle"] | {"gradients": at["update"]["gradients"],
                                    "theta's copy": at["teacher"]["theta's copy"],
                                    "the teacher's head": at["loss"]["the teacher's head"]}
    assert found == by_hand(SMALL_SHAPES[model], gpus * nodes // replicas)

def test_three_micro_batches_stand_for_all(counts):
    """Five micro-batches of a rank, four of them alike: the figures are those of all five."""
    assert counts["a replica a node"] == counts["the same, whole"]

def test_flops_are_those_of_the_products(counts):
    """Each weight takes part in three products for each token: forward, and two in backward. The teacher's
    forward and, if layers are recomputed, another one come on top, without the last product of a layer."""
    kept, recomputed = counts["not recomputed"], counts["eight GPUs"]
    d, f, V, heads, T, response, layers, rollouts = 72, 100, 1003, 3 * 24, 127, 64, 2, 2
    weights = d * (heads + 24 + 24) + heads * d + 3 * d * f
    forward = 2 * weights * T + 4 * heads * T * T / 2  # queries by keys, and by values, half of the pairs
    backward = 4 * weights * T + 10 * heads * T * T / 2
    loss = 8 * V * d * response  # two rows of logits, the gradients of hidden states and head
    assert kept["flops"] == rollouts * (layers * (2 * forward + backward) + loss)
    again = recomputed["flops"] - kept["flops"]
    assert again == rollouts * layers * (forward - 2 * d * f * T)
    found = [count["peaks"]["backward"][1]["activations"] for count in (recomputed, kept)]
    assert found[0] < found[1]

def test_report_and_the_formula_of_a_run(counts):
    found = counts["large"]
    highest = max(n for n, _ in found["peaks"].values())
    assert found["formula"] == pytest.approx(highest, rel=0.05)
    said = "\n".join(reported(found))
    print(said)
    assert "on 1 x 1 GPUs, 3 rollouts, micro-batches of 2048 tokens" in said
    assert f"loss {highest / 1e9:.2f}" in said and "24 GB: yes, --vllm_memory up to 0." in said

def test_shapes_have_the_published_numbers_of_parameters():
    published = {"Qwen3-0.6B": 596_049_920, "Qwen3-1.7B": 1_720_574_976, "Qwen3-4B": 4_022_468_096,
                 "Qwen3-8B": 8_190_735_360, "Qwen3-14B": 14_768_307_200, "Qwen3-32B": 32_762_123_264,
                 "R1-Distill-Llama-8B": 8_030_261_248}
    with torch.device("meta"):
        found = {name: AutoModelForCausalLM.from_config(config).num_parameters()
                 for name, config in SHAPES.items()}
    assert found == published

def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CXX", "nonexistent")
    with pytest.raises(SystemExit, match="needs a C.. compiler to simulate a GPU: install g"):
        memory("--model", "Qwen3-8B")

def test_a_run_says_what_training_takes_of_a_gpu(good, one_rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80e9))
    opsdc.prepare(opsdc.Config(**good, out=str(tmp_path / "out")))
    assert re.search(r"training takes about 0.\d+ GB of a GPU's 80 GB", capsys.readouterr().out)

def test_count_of_a_real_step_is_the_profilers(one_rank, monkeypatch):
    """On the CPU with real tensors, the same ledger beside torch's profiler, which sees the allocator."""
    monkeypatch.setattr(opsdc, "MAX_GAP", ANY_GAP)
    config = qwen3(128, 384, 3, 4, False, 4000, 32, 2)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    loaded, ledger = AutoModelForCausalLM.from_config(config), Ledger(empty, "cpu")
    ledger.live = {w.untyped_storage()._cdata: None for w in [*loaded.parameters(), *loaded.buffers()]}
    base = opsdc.Base("", None, config, None, "", empty, loaded)
    cfg = opsdc.Config(batch_size=3, micro_batch_tokens=600, max_prompt_tokens=300, max_response_tokens=300)
    with torch.profiler.profile(profile_memory=True) as profiler, ledger.counting():
        memory_steps(base, torch.device("cpu"), cfg, ledger, whole=True)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    seen = max(itertools.accumulate(e.nbytes() for e in events))
    print(f"counted {max(ledger.peaks.values())[0]}, seen by the profiler {seen}")
    assert max(ledger.peaks.values())[0] == pytest.approx(seen, rel=0.01)

# ---------------------------------------------------------------------------------------------------- 6. MAIN
if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["help"]
    function = make_toy if command == "toy" else globals().get(command)
    if not isinstance(function, types.FunctionType):
        sys.exit(__doc__)
    function(*arguments)
