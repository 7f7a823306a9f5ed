"""Measure a reasoning model: are its answers right, and how many tokens does it take to give them?

    python eval.py --model ID_OR_PATH [--benchmarks math500,aime24 | --data FILE.jsonl] [--out DIR]
    torchrun --nproc_per_node 8 eval.py ...      the same on eight GPUs, each with its share of the samples
    python eval.py compare BASE_DIR OURS_DIR [OURS_DIR ...] [--plot FILE.png]
    python eval.py curves RUN_DIR [RUN_DIR ...] --plot FILE.png
    python eval.py tokens --model ID_OR_PATH --data FILE [--out FILE.html]      (what the loss sees)

What counts as right decides the figures: one model scores 54.5 on MATH-500 if only boxes are read, and 93.0
if either format is. These rules apply to the text after the last </think> (or another family's closing tag).
    formats    The last `Answer:` line that is not empty or the last \\boxed{}, whichever comes later. An
               empty box hides the boxes before it; \\boxed{2} and \\boxed{3} is a list. A response that has
               neither format or was truncated is wrong.
    text       must agree: 7 million is not 7, nor is 42 because ... equal to 42; 10% loss is not 10% gain.
    units      may be left out (but 2m is 2 times m). Where both sides have one, they must agree: 7 cm is not
               7 m.
    numbers    in plain digits must be equal. A decimal may differ from a fraction or a root by a millionth of
               its value: 0.333333 is 1/3, but 0.333 is not.
    percent    10% is 0.1. A percent sign on one side only may also be left out: 10% is 10.
    letters    are compared with their case (c is not C), words without. A choice must name one letter only.
    lists      may be in any order, with each item the same number of times. The list 1, 2 is the same as the
               set {1, 2}, but neither the point (1, 2) nor the interval [1, 2).
Records also hold the verdicts of three other rules, to compare with published figures: `answer_only`,
`boxed_only`, and `either_full_text` (the paper's rule: either format, think block included). Left out:
models as graders, grading of code and proofs, conversion of units and number bases.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import functools
import glob
import gzip
import hashlib
import html
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

VERSION = 6  # of the grading rules and of the files written; runs of different versions are not compared

# ------------------------------------------------------------------------------------- SHARED BY BOTH SCRIPTS
def say(text):
    """Prints a text, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)

def check(condition, message):
    if not condition:
        raise ValueError(message)

@contextlib.contextmanager
def blaming(where):
    """Turns any error inside, also a library's, into a ValueError of one line that begins with `where`."""
    try:
        yield
    except Exception as error:
        # The general error of `datasets` gives its reason in later lines or in another error.
        reason = str(error).removeprefix("An error occurred while generating the dataset").strip()
        reason = " ".join((reason or str(error.__cause__ or "") or repr(error)).split())
        raise ValueError(f"{where}: {reason[:1000]}") from error

def explain(error):
    """Prints why a command failed: one line for what the user can mend before the engine starts, otherwise a
    traceback. A bug in this code or in a changed copy of it gets a traceback too, although `blaming` has made
    a ValueError of it."""
    cause = error
    while isinstance(cause, (ValueError, OSError)) and cause.__cause__:
        cause = cause.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    is_ours = frames and frames[-1].f_globals["__name__"] in ("__main__", "opsdc", "eval")  # not a library's
    is_mistake_in_code = is_ours and not isinstance(cause, (ValueError, OSError))
    if isinstance(error, SystemExit):
        print(error)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted. What was saved is kept: repeat the command to go on (opsdc.py with --resume)")
    elif isinstance(error, (ValueError, OSError)) and "vllm" not in sys.modules and not is_mistake_in_code:
        print("error: " + " ".join(str(error).split()))
    else:
        sys.excepthook(type(error), error, error.__traceback__)

def say_once(error):
    """The first rank to fail says why; the others end after that. The store's host may be gone by then."""
    from torch import distributed as dist
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    if store is None or within_seconds(10, store.add, "failed", 1) in (1, None):  # None: no store answers
        explain(error)
        sys.stdout.flush()
        if store:
            within_seconds(10, store.set, "said", "")
    else:
        within_seconds(10, store.wait, ["said"])

def within_seconds(seconds, call, *arguments):
    """The call's result, or None if it fails or takes longer; then its thread goes on until os._exit."""
    try:
        return concurrent.futures.ThreadPoolExecutor(1).submit(call, *arguments).result(seconds)
    except Exception:
        return None

def refuse_words(message):
    """Takes the place of argparse's own error, which would print the usage on every rank."""
    raise ValueError(f"{message}; see --help")

def from_rank_0(function, *arguments):
    """Returns on every rank what function(*arguments) returns on rank 0. The other ranks wait for it."""
    from torch import distributed as dist
    found = [function(*arguments) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]

def claim_folder(out, mark, files, results=""):
    """Locks the file `mark` in the folder `out` until this group of processes ends. A folder without the mark
    is not ours, and is refused if it holds anything that a run would write: names that match `files`. One
    with the mark is of an earlier run, and is refused if it holds names that match `results`."""
    from torch import distributed as dist

    def lock_and_mark():
        token = os.urandom(8).hex()
        with blaming(f"--out {out}: expected a new or empty folder or that of an earlier run (opsdc.py: with "
                     "--resume), where no other process is at work, found"):
            out.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in out.iterdir())
            check(out.name, "the present folder")  # "." has no name
            taken = [name for name in names if re.fullmatch(results if mark in names else files, name)]
            check(not taken, ", ".join(taken[:4]))
            file = os.open(out / mark, os.O_CREAT | os.O_RDWR, 0o666)  # never closed: locked until we end
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                check(not isinstance(error, BlockingIOError), error.strerror)
                say(f"warning: {out} cannot be locked ({error.strerror}); start no other command there")
            os.ftruncate(file, 0)
            os.write(file, token.encode())
            os.fsync(file)
        return token
    token = from_rank_0(lock_and_mark)  # written into the mark by rank 0, where all ranks must see it
    sees = [None] * dist.get_world_size()
    dist.all_gather_object(sees, (out / mark).exists() and (out / mark).read_text() == token)
    if not all(sees):
        raise ValueError(f"--out {out}: expected one folder that all nodes share, but rank "
                         f"{sees.index(False)} does not see what rank 0 wrote to {mark} there")

MAY_BE_0 = "lr", "weight_decay", "clip", "temperature", "refresh_every", "export_every", "seed", "top_k"
AT_MOST = {"vllm_memory": 1, "top_p": 1, "seed": 2**32 - 1}

def check_settings(settings):
    """Checks the options {name: value} of both scripts, and expands ~, which shells leave in --out=~/runs."""
    import torch
    from torch import distributed as dist
    for name in ("model", "teacher", "data", "out"):
        if settings.get(name):
            settings[name] = os.path.expanduser(settings[name])
    for name in ("model", "teacher"):
        value = settings.get(name)
        if value and not os.path.isdir(value):  # a path, or the export of a run, is not looked for on the hub
            is_path = value.startswith((".", "/")) or (Path(value).parent / "opsdc.lock").exists()
            check(not is_path, f"--{name} {value}: expected a folder with a chat model or its hub id, "
                  "found no such folder")
    for name, value in settings.items():
        if type(value) in (int, float):
            expected = "0 or more" if name in MAY_BE_0 else "more than 0"
            most = AT_MOST.get(name, math.inf)
            is_enough = value > 0 or value == 0 and name in MAY_BE_0
            check(is_enough and math.isfinite(value), f"--{name} {value}: expected {expected}")
            check(value <= most, f"--{name} {value}: expected at most {most}")
    check(torch.cuda.is_available() or not torch.version.cuda,  # else the CPU would be used
          "no GPU is seen: expected a driver R580 or newer; without a GPU, see the README")
    check(importlib.util.find_spec("vllm") or settings.get("given"),  # --given needs no engine
          "vllm is not installed: expected the packages of requirements.txt, see the README")
    check(os.environ.get("OMP_NUM_THREADS") != "0",  # with which every rank would use all cores
          "OMP_NUM_THREADS=0: expected 1 or more")
    for name in ("vllm_tp", "replicas"):  # eval.py has no replicas
        value, world = settings.get(name, 1), dist.get_world_size()
        check(world % value == 0, f"--{name} {value}: expected a divisor of the number of ranks, {world}")

def context_of(base, to_train=True):
    """The largest number of tokens of a sequence. Beyond its original context, LongRoPE has other factors.
    The engine uses them for all sequences if one may be long, the trainer for the long ones only: as they
    would disagree, training ends at the original context."""
    text = base.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if to_train and rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(text, "max_position_embeddings", math.inf)

# --------------------------------------------------------------------------------------------------- PROBLEMS
# Reading problems and their answers from data, for both scripts. Something that is not text in the place of a
# problem is refused with the number of its row: nobody would notice that the str() of a list is trained on.
# The answer that a row gives is called its gold. One that cannot be used counts as unknown, because training
# needs no answers. Names of fields are compared in lower case, with _ in place of spaces.
PROBLEM_FIELDS = "problem", "prompt", "question", "messages"  # the first that is filled holds the problem
ANSWER_FIELDS = ("answer", "final_answer", "expected_answer", "correct_answer", "ground_truth", "solution",
                 "reward_model")  # the first that is filled decides: if it gives no answer, that is unknown
ID_FIELDS = "unique_id", "id", "level"
OPTION_LISTS = "options", "choices", "option_list", "choice_list", "answer_choices"
OPTION_FIELDS = [[start + letter for letter in "abcdefghij"]
                 for start in ("option_", "choice_", "answer_", "op", "")]
GOLD_FIELD = re.compile(r"""(?x)  # fields that say which option is right; all that are filled must agree
    (final_|expected_)?answer | ground_truth | gold | cop | label | correct
    | (correct|right)_?(answer|option|index|letter) | answer_?(index|idx|letter|key|text|label|option)""")
WRONG_OPTION_FIELD = re.compile(r"(incorrect|wrong)_answers?(_\d)?|distractors?_?\d?")
MISSED_FIELD = re.compile(r"""(?x)  # fields that belong to the problem but cannot be put into its text
    ((decoded|question|problem|input)_)?                         # whose picture it is
        (image|img|picture|figure|video|audio)s? (_?(\d+|path|url|file|base64|bytes))?
    | (option|choice)[_-]?\d                                     # numbered options
    | body|passage|article                                       # a text that the question is about""")
MISSED_IN_TEXT = re.compile(r"""(?xi)  # signs in a problem's text that a picture belongs to it
    !\[[^\]\n]*\]\([^)\n]+\)                                     # Markdown's
    | <\|?(image|img|video|audio)[_\ ]?(\d+|pad)?\|?>            # placeholders of multimodal models
    | \\includegraphics                                          # LaTeX's""")
OTHER_FORMAT = re.compile(r"""(?x)  # signs that a prompt asks for an answer in a format of its own
    \#\#\#\# | \\boxed\b | </?answer> | (?i:last\ line\ of\ (your|the)\ (response|answer))
    | (?i:final\ answer\ (in|within|inside|after|as)\b)""")

def load_json(text, where=""):
    with blaming(f"{where}expected a JSON object, found {text[:60]!r}"):
        return json.loads(text)

def short_hash(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

@functools.cache
def field_name(field):
    return field.lower().replace(" ", "_")

@functools.cache
def is_read(field):
    """Is this field looked at? Rows that differ only in fields that are not are repeats."""
    name = field_name(field)
    names = {"tools", *PROBLEM_FIELDS, *ANSWER_FIELDS, *ID_FIELDS, *OPTION_LISTS, *sum(OPTION_FIELDS, [])}
    patterns = GOLD_FIELD, WRONG_OPTION_FIELD, MISSED_FIELD
    return name in names or any(pattern.fullmatch(name) for pattern in patterns)

# ---------- files, folders and the hub
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # as `datasets` calls them

def kind_of(path):
    """The suffix that tells how a file is read: x.csv.gz is a .csv."""
    return Path(path.name.lower().removesuffix(".gz")).suffix

def read_rows(source, wanted=None):
    """Yields (where, row) for every row of a file, of a folder of files or of a data set on the hub. Fields
    of a table for which wanted(field) is false are not read: their values are None."""
    with blaming(f"{source}: expected a file (.jsonl, .json, .csv, a .gz of one of these, or .parquet, with "
                 "encoding UTF-8), a folder of such files, or a data set of the hub (ID[:CONFIG[:SPLIT]]), "
                 "found"):
        exists = os.path.exists(os.path.expanduser(source))  # then colons are part of its name
        parts = [source] if exists else source.rsplit(":", 2)
        name, config, split = (parts + ["", ""])[:3]
        path, split = Path(name).expanduser(), split or "train"
        kind, text_files, arguments = kind_of(path), [], dict(path=name, name=config or None)
        if name and path.is_dir():  # Path("") would be the present folder
            text_files, arguments = open_folder(path, config, split)
        elif path.is_file():
            check(kind in KINDS, f"a file {path.suffix}")
            text_files = [path] if kind != ".parquet" else []
            # The folder without links, the file by its own name, whose suffix tells its kind
            arguments = dict(path="parquet", data_files=glob.escape(str(path.parent.resolve() / path.name)))
        else:
            check(kind not in KINDS and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name),
                  f"No such file or folder: {path}")
        tables = [(file, read_text_file(file)) for file in text_files]
        if not tables:  # then these are .parquet files, or on the hub
            tables = [(source, read_table(arguments, split, wanted))]
        for name, rows in tables:
            for number, row in enumerate(rows, 1):
                yield f"{name}, row {number}", row

def read_text_file(path):
    """Yields the rows of a .jsonl, .json or .csv file or of a .gz of one. The values of a .csv stay texts:
    `datasets` would turn 055 into 55, and would shift the cells of a row that has too many."""
    csv.field_size_limit(1 << 30)
    open_as = gzip.open if path.name.lower().endswith(".gz") else open
    with open_as(path, "rt", encoding="utf-8-sig", newline="\n") as file:  # only \n ends a line
        is_array = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        if kind_of(path) == ".csv":
            rows = csv.DictReader(file, strict=True)
        elif is_array:
            rows = load_json(file.read())
        else:
            rows = (load_json(line, f"{path.name}, line {number}, ")
                    for number, line in enumerate(file, 1) if line.strip())
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or None in row:  # a DictReader puts surplus cells under None
                raise ValueError(f"in row {number} no JSON object, or more cells than columns: {row!s:.60}")
            yield {field_name(field): value for field, value in row.items()}

def open_folder(path, config, split):
    """(the text files of the split, the arguments with which `datasets` loads it) of a folder. Its splits and
    configurations are those that `datasets` finds there."""
    import datasets
    check(not any((path / name).exists() for name in ("state.json", "dataset_dict.json")),
          "a dataset that was saved using `save_to_disk`; use its to_parquet or to_json instead")
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    kinds = {kind_of(file) for file in files if not any(part.startswith(".") for part in file.parts)}
    kinds &= KINDS.keys()
    if kinds & {".csv", ".parquet"}:
        kinds.discard(".json")  # such files describe the data
    check(kinds, "no such file in it")
    check(len(kinds) == 1, f"files {' and '.join(sorted(kinds))}; name one of them")
    kind = kinds.pop()
    arguments = dict(path=str(path), name=config or None)
    if glob.has_magic(str(path.resolve())):  # a name with brackets would be taken for a pattern
        arguments = dict(path=KINDS[kind], data_dir=glob.escape(str(path.resolve())))
    found = datasets.load_dataset_builder(**arguments).config.data_files or {}
    name = split.partition("[")[0]
    check(name in found, f"no split {name}, but {', '.join(map(str, found))}; name it: {path}::SPLIT")
    files = [Path(file) for file in found[name] if kind_of(Path(file)) == kind]
    # `datasets` gets their paths: for a folder with a dataset card it returns the copy that it cached under
    # the folder's name, even if the files have changed since.
    data_files = {name: [glob.escape(str(file)) for file in files]}
    return files if kind != ".parquet" else [], dict(path="parquet", data_files=data_files)

def read_table(arguments, split, wanted):
    """Yields the rows of a .parquet file or of the hub, by whole batches, which takes a tenth of the time."""
    import datasets
    table = datasets.load_dataset(**arguments, split=split)
    table = table.rename_columns({field: field_name(field) for field in table.column_names})
    unread = {field: None for field in table.column_names if wanted and not wanted(field)}
    table = table.with_format("arrow").remove_columns(list(unread))
    for batch in table.iter(1000):
        for values in zip(*(column.to_pylist() for column in batch.columns)):
            yield unread | dict(zip(table.column_names, values))

# ---------- a row's problem
def without_nulls(value):
    """In Arrow's tables each tool has the parameters of all the others, as nulls: they are dropped here."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value

def is_filled(value):
    if isinstance(value, dict | list):
        return any(map(is_filled, value.values() if isinstance(value, dict) else value))
    return bool(value) and value == value and str(value).strip() not in ("", "[]", "{}")  # NaN != NaN

def is_turn(message):
    """Is this one turn of a conversation? An assistant's turn may call tools and say nothing."""
    message = message if isinstance(message, dict) else {}
    is_call = message.get("role") == "assistant" and message.get("tool_calls")
    return isinstance(message.get("role"), str) and (is_call or isinstance(message.get("content"), str))

def as_problem(value, prefix="", suffix=""):
    """The problem as a text, or as messages if there are several. The prefix and suffix that the prompts will
    put around it are removed, where it has them already. None if it is blank."""
    if isinstance(value, str):
        # Messages in JSON. Python's 'role' and ShareGPT's "from" are recognised too, to be refused.
        is_chat = re.fullmatch(r"(?s)\[?\s*\{.*[\"'](role|from)[\"']\s*:.*\}\s*\]?", value.strip())
        value = load_json(value) if is_chat else [{"role": "user", "content": value}]
    messages = [] if value is None or value != value else without_nulls(value)  # NaN: missing in a table
    check(isinstance(messages, list) and all(map(is_turn, messages)),
          f"expected a text, or messages with the texts role and content, found {messages!r:.60}")
    json.dumps(messages, ensure_ascii=False).encode()  # fails on half a surrogate pair
    roles = [message["role"] for message in messages]
    check(roles[-1:] != ["assistant"], f"expected the user's turn last, found {', '.join(roles)}")
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked or not asked[-1].strip():
        return None

    def unwrap(text):
        return text.strip().removeprefix(prefix).removesuffix(suffix).strip() if prefix or suffix else text
    messages = edit_last_user(messages, unwrap)
    return messages[0]["content"] if len(messages) == 1 else messages

def edit_last_user(messages, edit):
    """The messages with edit(content) in the user's last turn."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    edited = messages[last] | {"content": edit(messages[last]["content"])}
    return [*messages[:last], edited, *messages[last + 1:]]

class NotInWords(ValueError):
    """A part of the problem is in a picture or in another field."""

def read_problem(row, where, prefix="", suffix=""):
    """(field, problem, tools): {"prompt": prefix + "1+1?" + suffix} gives ("prompt", "1+1?", None)."""
    for field in PROBLEM_FIELDS:
        with blaming(f"{where}, field {field}"):
            problem = as_problem(row.get(field), prefix, suffix)
        if problem:  # `field` is the first one that is filled, or the last one
            break
    missed = [name for name in row if MISSED_FIELD.fullmatch(name) and is_filled(row[name])]
    missed += [found[0] for found in MISSED_IN_TEXT.finditer(str(problem))]
    if missed:
        found = ", ".join(missed)
        raise NotInWords(f"{where}: expected a problem in words, found {found}; take such rows out")
    check(problem, f"{where}: expected a field problem, prompt or question, found {', '.join(row)}")
    with blaming(f"{where}, field tools"):
        tools = without_nulls(row.get("tools")) or None
        return field, problem, load_json(tools) if isinstance(tools, str) else tools

# ---------- a row's answer
NO_VALUE = re.compile(r"""(?xis)  # golds that say that there is no answer; no later field is looked at
    (the\ )? proof\b .* | see\ .{0,20} (proof|solution|above|below) \.?      # "See the proof above."
    | n/?a | nan | none\.? | null | unknown\.? | tbd | todo | [-?]+            # left open
    | (answer\ )? not\ ?(found|available|provided|given) \.? | no\ answer \.? # the same in words
    | assert\ .* | def\ \w+\(.*                                              # tests of a program""")
SENTENCE_END = re.compile(r"""(?x)
    (?<! \b[A-Z]) (?<! \b[A-Z]\w) (?<! \b[A-Z]\w\w) (?<! \b[A-Z]\w{3})  # not that of St., Mrs., Prof.,
    (?<! \b\w\.\w) (?<! \bapprox) (?<! \b(?:vs|cf|ca))                  # U.S., a.m., approx., vs., cf., ca.,
    [.!?] \s+ (?= [A-Z\\$(])                                   # but a full stop before a new sentence
    | [。！？]""")
PLAIN_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|[\u3040-\u9fff]")  # no LaTeX command; a CJK character

def as_text(value):
    """A text, number or boolean as a text; "" if it is missing or blank."""
    check(isinstance(value, (str, int, float, type(None))), f"expected a text, found {value!r:.60}")
    if value is None or value != value:  # NaN is a table's missing number
        return ""
    return format(Decimal(str(value)), "f") if isinstance(value, float) else str(value).strip()

def gold_text(value):
    """(text, why it is no value, or "") of a gold. The text is what a solution has in its last box or after
    GSM8K's ####, or else the whole gold. The golds ["2"] and {"ground_truth": 2} and the same in JSON mean 2;
    test cases are not a text. Several sentences, or more than 25 words, are a proof."""
    if isinstance(value, str) and re.match(r"\s*[\[{]\s*[\[{]?\s*[\"']", value):  # ["2"], but not [0, 1)
        try:
            value = json.loads(value)
        except ValueError:
            return "", f"{value!r:.40} is no text"
    if isinstance(value, dict) and "ground_truth" in value:
        return gold_text(value["ground_truth"])
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, (str, int, float, type(None))):
        return "", f"{value!r:.40} is no text"
    text = as_text(value)
    text = last_box(text)[1] or text.rpartition("####")[2].strip()
    words = len(PLAIN_WORD.findall(text))
    if NO_VALUE.fullmatch(text):
        return text, f"{text[:40]!r} is no value"
    is_proof = words > 25 or words >= 5 and SENTENCE_END.search(text)
    return text, f"{text[:40]!r} is a text of {words} words" if is_proof else ""

def read_answer(row):
    """(field, known answer, "") of a row, or (None, None, why the answer is unknown). A solution in words
    that has neither a box nor #### is skipped."""
    for field in ANSWER_FIELDS:
        value = row.get(field)
        text, why = gold_text(value)
        if field == "reward_model" and value and "ground_truth" not in str(value):
            text, why = "", f"{value!r:.40} has no ground_truth"
        if field == "solution" and " " in text and text == str(value).strip():  # in words
            continue
        if why:
            return None, None, f"{field}: {why}"
        if text:
            return field, text, ""
    return None, None, "no answer"

# ---------- questions with options
# The options keep their order and their letters, because some refer to others ("Both A and B"). They are
# shuffled only where the fields themselves tell the right option from the wrong ones, as GPQA's do.
LETTERS = [*"ABCDEFGHIJ"]
NAMED_OPTION = re.compile(r"""(?xs)  # of a gold in lower case
    (?: (?:the\ )? (?:option|choice|answer) (?:\ is)? :?\  )?   # "the answer is: "
    (\w) (?: [).:]+ \s* (.+) )?                                 # "b", or "b) paris" """)

def read_options(row):
    """(fields, labels, options, whether to shuffle them) of a question; empty lists without options."""
    for field in OPTION_LISTS:
        if row.get(field):
            labels, options = LETTERS, row[field]
            if isinstance(options, str):
                options = load_json(options)
            if isinstance(options, dict) and "text" in options:  # ARC: {"label": ["A"], "text": ["red"]}
                options = dict(zip(map(str, options["label"]), options["text"]))
            if isinstance(options, dict):  # MedQA: {"A": "red"}
                labels = sorted(label for label in options if options[label] is not None)
                options = [options[label] for label in labels]
            check(isinstance(options, list), f"expected a list of options, found {options!r:.60}")
            return [field], labels, options, False
    for fields in OPTION_FIELDS:
        fields = [field for field in fields if field in row]
        if len(fields) >= 4 or len(fields) >= 2 and len(fields[0]) > 1:  # two fields a and b may be anything
            return fields, LETTERS, [row[field] for field in fields], False
    wrong = [field for field in sorted(row) if WRONG_OPTION_FIELD.fullmatch(field)]
    if wrong and is_filled(row.get("correct_answer")):
        options = [row["correct_answer"]]
        for field in wrong:
            options += row[field] if isinstance(row[field], list) else [row[field]]
        return ["correct_answer", *wrong], LETTERS, options, True
    return [], LETTERS, [], False

def places_of(gold, labels, options):
    """The places of the options that a gold may mean. A number is a label, or a place counted from 0. A text
    is an option, a label, both, or a place: 2, "Paris", "(C)", "C. Paris" and "2"."""
    numbers = labels if labels[0].isdigit() else [str(place) for place in range(len(options))]
    text, _ = gold_text(gold)
    if isinstance(gold, (int, float)) and text.removesuffix(".0") in numbers:
        return [numbers.index(text.removesuffix(".0"))]
    bare, *bare_options = [words.strip("()[]. :").lower() for words in (text, *options)]
    for wanted, among in ((text, options), (bare, bare_options)):
        if wanted in among:
            return [place for place, option in enumerate(among) if option == wanted]
    named = NAMED_OPTION.fullmatch(bare)
    for names in (labels, numbers):
        if named and named[1].upper() in names[:len(options)]:
            place = names.index(named[1].upper())
            return [place] if named[2] in (None, bare_options[place]) else []
    return []

def find_gold(row, labels, options):
    """(fields that say which option is right, its place, "") or (fields, None, why it is unknown)."""
    fields = [field for field in row if GOLD_FIELD.fullmatch(field) and row[field] not in (None, "", [])]
    # The place 0 counts as filled. The place -1 stands for a label that is kept secret, as in test splits.
    places = range(len(options))
    for field in fields:
        found, (text, why) = places_of(row[field], labels, options), gold_text(row[field])
        if not found and (why or text in ("", "-1")):
            return fields, None, f"{field}: {why or repr(text) + ' is no value'}"
        check(found, f"expected as {field} the letter, text or place of an option, found {row[field]!r:.60}")
        places = [place for place in places if place in found]
        check(places, "expected fields that mean the same option, found "
              + ", ".join(f"{name} {row[name]!r:.40}" for name in fields))
    return (fields, places[0], "") if fields else ([], None, "no answer")

def letter_options(row, problem, question):
    """(problem with its options lettered, letter of the right one or None, why that is unknown, {field: what
    it is read as}). Without options the last is {}. The question decides how options are shuffled."""
    fields, labels, options, is_to_shuffle = read_options(row)
    options = [as_text(option) for option in options]
    padding = ("", "N/A") if options.count("N/A") > 1 else ("",)
    while options and options[-1] in padding:  # MMLU-Pro fills its lists up to ten options
        options.pop()
    if not options:
        return problem, None, "", {}
    check(1 < len(options) <= len(LETTERS) and all(options),
          f"expected a question and two to ten texts to choose from, found {options!r:.80}")
    marks = [re.match(rf"\(?{letter}[).:]\s*(?=\S)", option) for letter, option in zip(LETTERS, options)]
    if all(marks):  # AQuA: ["A)21", "B)24"]
        options = [option[mark.end():] for mark, option in zip(marks, options)]
    golds, place, why = ([], 0, "") if is_to_shuffle else find_gold(row, labels, options)
    order = list(range(len(options)))
    if is_to_shuffle:
        random.Random(short_hash(question)).shuffle(order)
    lines = ["", "Answer with the letter of the correct option."]
    lines += [f"({letter}) {options[i]}" for letter, i in zip(LETTERS, order)]

    def add_options(text):
        return "\n".join([text.strip(), *lines])
    problem = add_options(problem) if isinstance(problem, str) else edit_last_user(problem, add_options)
    answer = None if place is None else LETTERS[order.index(place)]
    return problem, answer, why, dict.fromkeys(fields, "options") | dict.fromkeys(golds, "answer")

# ---------- all rows
def read_row(row, where, prefix="", suffix=""):
    """dict(problem, tools, answer) of a row, why its answer is unknown, and {field: what it is read as}."""
    field, problem, tools = read_problem(row, where, prefix, suffix)
    with blaming(f"{where}, a question with choices"):
        problem, answer, why, uses = letter_options(row, problem, row[field])
    if not uses:
        gold, answer, why = read_answer(row)
        uses = {gold: "answer"} if gold else {}
    uses = {field: "problem"} | uses | ({"tools": "tools"} if tools else {})
    return dict(problem=problem, tools=tools, answer=answer), why, uses

def read_problems(source, prefix="", suffix=""):
    """[dict(problem, tools, answer, ids, number)], each problem once, with the first answer of it that is
    known. Repeated rows are skipped before they are parsed: DAPO has each of its 17,000 problems 100 times.
    """
    say(f"reading {source} ...")
    found, origins = {}, {}  # by problem: what is returned; its first row, and why that has no answer
    fields, uses = {}, {}  # all fields in their order, and {field: what it is read as}
    seen, missed = set(), []  # hashes of rows, and refusals
    number = others = 0
    for number, (where, row) in enumerate(read_rows(source, is_read), 1):
        fields.update(row)
        row_hash = hash(pickle.dumps([(field, row[field]) for field in row if is_read(field)]))
        if row_hash in seen:  # 64 bits: two of two million rows share one in a run out of ten million
            continue
        seen.add(row_hash)
        try:
            problem, why, used = read_row(row, where, prefix, suffix)
        except NotInWords as error:
            missed.append(str(error))
            continue
        uses |= used
        key = json.dumps([problem["problem"], problem["tools"]])
        if key not in found:
            ids = {name: row.get(name) for name in ID_FIELDS}
            found[key], origins[key] = problem | dict(ids=ids, number=number), (where, why)
        elif found[key]["answer"] is None:
            found[key]["answer"] = problem["answer"]
        else:
            others += problem["answer"] not in (None, found[key]["answer"])
    if missed:
        raise ValueError(f"{missed[0]} ({len(missed)} of {number} rows, not counting repeats)")
    unknown = [", ".join(origins[key]) for key in found if found[key]["answer"] is None]
    first = f"the first without an answer: {unknown[0]}; " if unknown else ""
    say(f"{source}: {number} rows, {len(found)} problems, {len(unknown)} without a known answer, {others} "
        f"given again with a different answer; {number - len(found)} rows were repeats; {first}"
        f"read: {', '.join(f'{name} as {use}' for name, use in uses.items())}; "
        f"not read: {', '.join(name for name in fields if name not in uses)}")
    formats = [origins[key][0] for key in found if OTHER_FORMAT.search(str(found[key]["problem"]))]
    if formats and (prefix or suffix):
        say(f"{len(formats)} prompts ask for a format of their own ({formats[0]} is the first), and get that "
            "of --wrapper math too; --wrapper none takes them as they are")
    return list(found.values())

# ---------------------------------------------------------------------------------------------------- GRADING
# The first half finds the answer in a response. Everything in it takes time linear in the text, so that a
# megabyte of brackets cannot block a run.
THINK_TAGS = [  # (opening, closing); what follows the last closing tag counts
    (r"<(?:\w{1,9}:)?(?:think|thought)>", r"</(?:\w{1,9}:)?(?:think|thought)>"),  # most, Seed and EXAONE
    (r"\[THINK\]", r"\[/THINK\]"),                                                # Mistral
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),                             # Cohere
    (r"<\|channel>", r"<channel\|>")]                                             # Gemma 4
OPENING, CLOSING = (re.compile("|".join(tags)) for tags in zip(*THINK_TAGS))
SPECIAL = re.compile(r"<[|｜][^<>\n]{1,40}[|｜]>|</?s>|</answer>|<eos>|<pad>|<end_of_turn>")  # written out
ANSWER_MARKER = re.compile(r"""(?xm)  # what comes before an answer
    (?: ^[ \t>*_#`$-]* (?i: (?:the\ |my\ )?(?:final\ |correct\ )?answer )    # in any case where a line starts
      | \b(?:Answer|ANSWER) ) [ \t*_`]{0,8} [:：]                            # elsewhere only with a capital
      (?: \ ?[Tt]he\ [\w ]*(?:answer|option|choice)\ is\b )?                 # Answer: The correct option is B
  | \b[Ff]inal\ answer\ is\b :? (?= [^\n]{1,400}I\ hope\ it\ is\ correct )  # Minerva's prompt""")
ANSWER_VALUE = re.compile(r"""(?xs)  # the rest of the line, after a formula that may take several lines
    (?: \$\$.*?\$\$ | \$\n.*?\$ | \\\[.*?\\\] | \\\(.*?\\\) | [^\n]*\\begin\{.*?\\end\{ )? [^\n]*""")
BRACES = re.compile(r"""(?x)  # the boxes and braces of a text; \{ and \} are none
    (?P<box> \\f?box(?:ed)?\s*\{ )
    | (?P<bare> \\boxed\s*[-+]?\d+(?:[.,/]\d+)* )                    # \boxed 5 needs no braces
    | \\. | (?P<open> \{ ) | (?P<close> \} )""")
BETWEEN_BOXES = re.compile(r"""(?x)  # what may stand between boxes that are one list
    (?: [\s,;$&~*] | \\[\[\]()\\,;:!\ ] | \\q?quad                   # spaces, commas, the ends of formulas
      | \b(and|or)\b                                                 # a word, bare
      | \\(?:text|mathrm)\{ [\s,]{0,9} (and|or)? [\s,]{0,9} \} )*    # or in \text""")
# A longer answer is wrong, in characters; the longest gold of MATH-500 has 53. What stands in a text may be
# four times as long, because markup is taken off. And at most as many boxes are joined into a list.
LONGEST = 1000

class Verdict(NamedTuple):
    correct: bool
    answer: str | None      # as extracted, None if there is none
    answer_only: bool       # the verdicts of the three other rules, see the top of this file
    boxed_only: bool
    either_full_text: bool
    truncated: bool         # ended at the token limit, or still inside a think block
    no_answer: bool         # ended by itself, but in neither format

def last_answer_line(text):
    """(start of the last `Answer:` that has a value, the value), or (-1, None)."""
    for marker in reversed(list(ANSWER_MARKER.finditer(text))):
        rest = text[marker.end():marker.end() + 4 * LONGEST].lstrip(" \t\n*_`}")  # or on the next line
        value = clean(ANSWER_VALUE.match(rest)[0])
        if value:
            return marker.start(), value
    return -1, None

def find_boxes(text):
    """[(start, start of the content, end of the content, end)] of the balanced boxes of a text, without those
    that stand inside another. One pass with a stack of open braces: unbalanced braces cost nothing."""
    stack, boxes = [], []
    for token in BRACES.finditer(text):
        kind, (start, end) = token.lastgroup, token.span()
        if kind == "bare":
            boxes.append((start, start + len("\\boxed"), end, end))
        elif kind == "close" and stack:
            opened, content, is_box = stack.pop()
            if is_box:
                while boxes and boxes[-1][0] > opened:  # \boxed{\boxed{2}}
                    boxes.pop()
                boxes.append((opened, content, start, end))
        elif kind in ("box", "open"):
            stack.append((start, end, kind == "box"))
    return boxes

def last_box(text):
    """(end of the last \\boxed{}, its content), or (-1, None). Boxes in a row are one list."""
    boxes = find_boxes(text)
    answer, values, following = None, set(), None  # from the last box backwards
    for start, content, end, after in reversed(boxes[-LONGEST:]):
        value = clean(ANSWER_MARKER.sub("", text[content:end][:4 * LONGEST]))
        if not value:  # an empty box hides those before it
            break
        if answer is None:
            answer = value
        elif between := BETWEEN_BOXES.fullmatch(text, after, following):
            word = between[1] or between[2]
            answer = f"{value} {word} {answer}" if word else f"{value}, {answer}"
        else:
            break
        values.add(value)
        following = start
    if len(values) == 1:  # the same value several times is one value
        answer = values.pop()
    return boxes[-1][3] if boxes else -1, answer

def find_answers(text):
    """The answers by three rules: the later of the two formats, the `Answer:` line alone, the box alone."""
    (line_start, line), (box_end, box) = last_answer_line(text), last_box(text)
    is_box_later = box is not None and box_end > line_start  # a box in the line is later than its start
    return box if is_box_later else line, line, box

def clean(text):
    """The bare value, without special tokens, Markdown, delimiters of maths and trailing punctuation."""
    text = re.sub(r"(?<!\\)\$|(?<!\\)\\[()\[\]]", " ", SPECIAL.sub("", text))  # but \$ and \\[2pt] stay
    text = " ".join(text.replace("...", "\\ldots").split()).lstrip(" *`\"“:").rstrip(" *_`\"”.,;:。✓✅")
    if text.count("}") > text.count("{"):  # \textbf{Answer: 7}
        text = text.removesuffix("}").rstrip(" .")
    text = re.sub(r"(?i)^the (?:correct )?(?:answer|option) is:? |[. ]*I hope it is correct$", "", text)
    return text.rstrip("\\ .").strip()

# The second half, which runs in a worker, decides whether two values are equal. The rules, in this order,
# give each thing one spelling that math-verify can read. A rule is (pattern, replacement, example, near
# miss): the example "answer -> gold" is accepted because of the rule, the near miss must stay refused.
SYMBOLS = str.maketrans({
    "−": "- ", "–": "- ", "—": "- ", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/ ", "⁄": "/ ",
    "≡": r"\equiv ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm ",
    "∅": r"\emptyset ", "∠": r"\angle ", "θ": r"\theta ", "∈": r"\in ", "≈": r"\approx ",
    "△": r"\triangle "})
ARGUMENT = r" ?(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\w|\\pi|\\theta))"  # of a LaTeX command, in braces or bare
AND = r"(?:,? ?\\text\{,? ?and,?\} ?|,? ?\band\b ?|, ?)"
AND_OR = r"(?:,? ?(?:\\text\{,? ?(?:and|or),?\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])|\\&))+"
# Units by their names: compared where both values have one, but never converted into each other. An s may
# follow a name; "inche" is for inches.
MEASURES = {name: names.split()[0] for names in (
    "hour hr h", "minute min", "second sec s", "day", "week", "month", "year yr", "mm millimeter", "meter m",
    "cm centimeter", "km kilometer", "inch in inche", "foot ft feet", "yard yd", "mile mi mph", "gram g",
    "mg milligram", "kg kilogram", "pound lb", "ounce oz", "ml mL", "liter l", "cent", "dollar")
    for name in names.split()}
MEASURE = "(" + "|".join(MEASURES) + r")s?(?![a-zA-Z])"

def as_point(match):
    """(3,4) for "x = 3, y = 4", but "x = 3, x = 4" stays as it is."""
    parts = sorted(part.replace(" =", "=") for part in re.split(AND, match[0]))
    names = {part[0] for part in parts}
    return f"({','.join(part[2:] for part in parts)})" if len(names) == len(parts) else match[0]

def join_inequalities(match):
    """Between inequalities it matters whether the word is "and" or "or"."""
    return re.sub(AND_OR, lambda word: r"\lor " if "or" in word[0] else r"\land ", match[0])

# Twice in the rules, because sqrt(1+sqrt(9)) has one inside another
SQUARE_ROOT = (r"(?:√|(?<![\\a-zA-Z])sqrt|\\sqrt(?= ?\()) ?(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}",
               "sqrt(1+sqrt(9)) -> 2", "sqrt(1+sqrt(9)) -> 4")
RULES = {
    "unicode": [
        ("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]", "", "1\u200b7 -> 17", "1\u200b7 -> 1"),
        ("[²³¹⁰-ⁿ]+", r"^{\g<0>}", "10³ -> 1000", "10³ -> 103"),  # before NFKC, which would make 103 of it
        ("[₀-ₜ]+", r"_{\g<0>}", "121₃ -> 121_3", "121₃ -> 121"),
        ("[¼-¾⅐-⅞]", r" \g<0>", "2½ -> 5/2", "2½ -> 21/2"),
        ("[^ -~º]+", lambda m: unicodedata.normalize("NFKC", m[0]).translate(SYMBOLS), "２×３ -> 6", "６ -> 9")],
    "markup": [
        (r"(?:\\q?quad(?![a-zA-Z])|~|(?<!\\)\\[,;: ]|\s)+", " ", r"\,\text{up} -> up", r"5\,6 -> 56"),
        (r"(?<=[{(\[]) | (?=[{})\]^])", "", r"7\text{ units } -> 7", r"7\text{ million } -> 7"),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|boxed|bf|[lL]arge|(?:text)?color ?\{\w+\})"
         "(?![a-zA-Z])", "", r"\big\{1\big\} -> 1", r"\left[0,1\right) -> 1"),
        # Signs of currencies go. \$7.50 becomes 7.50 dollars, so that it is not 7.50 cents.
        (r"\\?\$ ?(\d(?:[\d.,]|\\!|\{,\})*(?<!,)|\.\d+)(?!,?\d| ?[\w\\.{])|\\?[$€£¥₹¢]",
         lambda m: rf"{m[1]}\text{{dollars}}" if m[1] else " ", "€7.50 -> 7.5", r"\$7.50 -> 7.5 cents"),
        (r"^ ?(?:\\approx|\\sim|=) ", "", r"\approx 5.2 -> 5.2", r"\neq 5.2 -> 5.2"),
        (r"\\(?:math(?!bb)\w+|bm|boldsymbol)(?: ?\{ ?(\w) ?\}| (\w)\b)", r" \1\2",
         r"\mathbf a -> \mathbf{a}", r"\mathbf a -> \mathbf{b}"),
        (r"\\(?:text\w+|mbox|operatorname|math(?!bb)\w+|bm|boldsymbol|underline) ?(?=\{)", r"\\text",
         r"\mathrm{west} -> \text{west}", r"\mathrm{west} -> \text{east}"),
        (r"\\text(?=\{[^{}]*(?:\\|\d/\d))", "", r"\mathbf{\frac34} -> 3/4", r"\mathbf{14/2} -> 2/14"),
        # Of a set {x : condition} only the condition stays.
        (r"^(?:\w ?= ?)?\\\{ ?\w(?: ?\\in ?\\mathbb ?\{?R\}?)? ?(?:[:|]|\\mid) ?(.+)\\\}$", r"\1",
         r"\{x : x \le 3\} -> x \le 3", r"\{x \mid x < 3\} -> x \le 3")],
    "functions": [
        (r"(\\text\{)?(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|pi|ln|log|exp)(?![a-zA-Z])(?(1)\})", r"\\\2 ",
         r"sin(x) -> \sin x", r"sin(x) -> \cos x"),
        SQUARE_ROOT, SQUARE_ROOT,
        (r"\\[dtc]?frac" + ARGUMENT * 2, r"\\frac{\1\2}{\3\4}", r"\tfrac12 -> \frac{1}{2}", r"\frac12 -> 12"),
        (r"\\(sqrt|log_)" + ARGUMENT, r"\\\1{\2\3}", r"2\sqrt3 -> \sqrt{12}", r"\sqrt32 -> \sqrt{32}"),
        (r"\*\*(?=[\w({\\-])", "^", "2**3 -> 8", "2**3 -> 6"),
        (r"\^ ?(?:\(([^()]*)\)|(\\frac\{[^{}]*\}\{[^{}]*\}|-\d+))", r"^{\1\2}", "2^(3) -> 8", "2^(3) -> 6"),
        (r"\(?\\?(?<![a-z])[pb]?mod ?\{?(\w+)\}?\)?", r"\\pmod{\1}", r"4 mod 9 -> 4 \pmod9", "4 mod 9 -> 4"),
        (r"(?<![\\a-zA-Z_])(?<!_\{)i(?![a-zA-Z])", r"\\sqrt{-1}", "(1+i)^2 -> 2i", "(1+i)^2 -> -2i"),
        (r"(?<=\\\\) ?\[[-\d. ]+[a-z]{2}\]", "", r"1\\[2pt] 2 -> 1 \\ 2", r"1\\[2pt] 3 -> 1 \\ 2"),
        (r"\\varnothing", r"\\emptyset", r"\varnothing -> \emptyset", r"\{\varnothing\} -> \emptyset"),
        (r"\\langle(.*)\\rangle", r"(\1)", r"\langle 3,4\rangle -> (3,4)", r"\langle 4,3\rangle -> (3,4)")],
    "numbers": [
        (r"\{([,:])\}|(?<=,)\\! ?", r"\1", "3{:}45 -> 3:45", "3{:}45 -> 3:54"),
        (r"(?<=\d) ?(?:\\colon|(\\text\{)?to(?(1)\})) ?(?=\d)", ":", "3 to 5 -> 3:5", "3 to 5 -> 5:3"),
        (r"\((\w+)\)_", r"\1_", "(1011)_2 -> 1011_2", "(1011)_2 -> 1011"),
        (r"(?<=\d)\^ ?\{?(?:\\text\{)?(st|nd|rd|th)\}*", r"\1", "5^{th} -> 5th", "5^{th} -> 4th"),
        (r"(?<=\d) ?x ?(?=10\^)", r"\\cdot ", r"6 x 10^{23} -> 6 \cdot 10^{23}", r"6 x 10^2 -> 60"),
        (r"(?<=\d)[eE]\+?(-?\d{1,3})(?![\d.]|[\dA-F]*_)", r"\\cdot 10^{\1}", "2e-3 -> 0.002", "2e3 -> 0.002"),
        (r"(?<=\d) ?(\\text\{)?(thousand|[mb]illion)\b(?(1)\})",
         lambda m: r"\cdot 10^" + {"t": "3", "m": "6", "b": "9"}[m[2][0]], "2.5 million -> 2,500,000",
         "2.5 million -> 2.5"),
        (r"(?<![\d./^_{}])(\d+) (\d+)/ ?(\d+)(?![\d./])", r"\1\\frac{\2}{\3}", "2 1/2 -> 2.5", "2 1/2 -> 1"),
        # Thousands are set apart by spaces, apostrophes or full stops, or by commas before a percent sign.
        (r"(?<![\d.,])\d{1,3}(?:(?:[ ']\d{3})+|(?:\.\d{3}){2,}|(?:,\d{3})+(?= ?\\?%))(?![\d.])",
         lambda m: re.sub(r"\D", "", m[0]), "1'234'567 -> 1234567", "1'23 -> 123"),
        (r"(?<=[\d)}.]) ?((?:\\text)?\{)?(?:\\?%|per ?cent\b)(?(1)\})(?: (?=[a-z\\]))?", r"\\%",
         "25 percent -> 1/4", "25 percent gain -> 1/4"),
        # Digits that repeat without end are written 30 times.
        (r"\.(\d*)\\(?:overline|bar|dot) ?\{(\d+)\}", lambda m: f".{m[1]}{m[2] * 30}", r"0.\bar{6} -> 2/3",
         r"0.\bar{6} -> 0.6")],
    "units": [  # more in UNITS
        (r"\^\{?\\circ\}?|\\degree|º", "°", r"30\degree -> 30", r"30\degree -> 3"),
        (r"(\\(?:sin|cos|tan|cot|sec|csc)[ ({]*)([\d.]+)°", r"\1\\frac{\2\\pi}{180}", r"\sin 30° -> 1/2",
         r"\sin 30 -> 1/2"),
        (r"°(?: ?(?:\\text\{[CF]\}|[CF](?![a-zA-Z])))?", " ", "20° C -> 20", "20 C -> 20"),
        # A value with two units keeps both, under the names that MEASURES gives them.
        (r"(?<=\d) ?(?:\\text\{)?" + MEASURE + r"[., }and]*(?=[\d.]+ ?(?:\\text\{)?(?!\1)" + MEASURE + ")",
         lambda m: rf"\text{{{MEASURES[m[1]]}}}", "2 hours and 30 minutes -> 2 hr 30 min",
         "2 hours and 30 minutes -> 30 hr 2 min"),
        (r"(\\text\{\w+\}[\d.]+) ?" + MEASURE + "$", lambda m: rf"{m[1]}\text{{{MEASURES[m[2]]}}}",
         "5 min 20 s -> 5 minutes 20 seconds", "5 min 20 s -> 5 hr 20 s"),
        (r"(?i)\b([ap])\.(?=m)", r"\1", r"7:20 p.m -> 7:20 \text{ PM}", r"7:20 a.m -> 7:20 \text{ PM}")],
    "lists": [
        (r"^.*(?:[<>]|\\[lg]eq?|\\neq?)(?![a-z]).*", join_inequalities, "x>1 and x>3 -> x>3",
         "x>1 or x>3 -> x>3"),
        (rf"^[x-z] ?=[^=,]*?(?:{AND}[x-z] ?=[^=,]*?){{1,2}}$", as_point, "y = 4 and x = 3 -> (3,4)",
         "x = 3, x = 4 -> (3,4)"),
        (AND_OR, ",", r"2 \text{ or } 5 -> 2, 5", r"2 \text{ or } 5 -> 25"),
        (r"^([^,]*)\\pm([^,]*)$", r"\1+\2,\1-\2", r"\frac{3 \pm i}{2} -> \frac{3}{2} \pm \frac{i}{2}",
         r"3 \pm i -> 3 + i")]}

# What may stand behind a number as its unit, as patterns for re.VERBOSE with an example and a near miss as
# above. math-verify's own list is not used: it has single letters (2m would be 2) and words as am and east.
UNITS = [
    ("|".join(name for name in MEASURES if len(name) > 1 and name != "hr"), "35 cm -> 35", "35 cm -> 35 m"),
    ("squared? | cubed | cubic | sq | cu", "5 square units -> 5", "5 square cm -> 5 cm"),
    ("people | person | children | (?:wo)?men | way", "7 men -> 7", "7 abdomen -> 7"),
    (r"per\ [a-z]+", "60 miles per hour -> 60", "60 per cent -> 6"),
    ("nm | [kM]J | k?cal | k?mol | [kMG]?(?:eV|Hz|Pa)", "6.5 kJ -> 6.5", "6.5 k -> 6.5"),
    ("deg | degree | rad | unit | cup | USD", "8 deg -> 8", "8 dig -> 8"),
    # One letter is a unit only beside a slash or in \text.
    (r"[Jm](?=\ ?/) | (?<=/)[smhK]", "7 m/s -> 7", "7m -> 7"),
    (r"(?<=\{)[A-Zmgshl](?=[}/\ ^])", r"4\text{ h} -> 4", "4 h -> 4"),
    (r"hr(?!\^)", "4 hrs -> 4", "4 hr^n -> 4"),
    # Any plural, but not of a word that changes the value
    (r"(?!(?:ten|\w+red|thousand|\w+illion|dozen|third|\w+th|halve|quarter|\w+crease|\w+verge|plu|minu|"
     r"\w+s)s)[a-z]{3,}s", "14 stamps -> 14", "14 minus -> 14")]
UNIT = re.compile(r"""(?x)
    (?: (?<!%) | (?= (?:\\text\{)?per\  ) )    # behind a percent sign only "per year", not "10% gain"
    (?: (?: (?<=[\d)}\]!%])\ ? | (?<=\\pi)\  ) # a unit without \text stands behind a number or \pi,
        (?= [a-zA-Z]{2} | [Jm]\ ?/ )           # and has two letters, or is that of 5 J/g or 7 m/s
      | (?<=.) \ ?/?\ ? (\\text\{) )           # a unit in \text stands behind anything
    (?: (?:""" + "|".join(pattern for pattern, *_ in UNITS) + r""") s? (?![a-zA-Z])
        (?: [./\ ] | \^\{?-?[1-3]\}? )* )+     # several units, each with its power: kg m/s^2
    (?(1) \} (?: \^\{?[23]\}? )? )             # \text{cm}^2
    (?! \ ?\d )                                # 5 gallons 2 quarts is not 52""")
DIMENSION = re.compile(r"""(?x) (?<![a-zA-Z])
    (?: (sq|cu)\w*[.\ ]+ )? """ + MEASURE + r"""     # sq. cm, cubic m
    (?: \}?\^\{?-?(\d) | \ (sq|cu)\w*ed )?           # cm^2, \text{cm}^{-2}, cm squared""")
MISREAD = [  # what math-verify misreads, with a pair that it would take for equal; compared as text only
    (r"(?<![a-zA-Z\d_{])\d[\dA-F]*_", "52_9 -> 52_8"), (r"(?<![\d_^])\d+ \d", "5 6 -> 11"), ("'", "f' -> f"),
    (r"\\text", r"5\text{ R }2 -> 2\text{ R }5"), (r"\\angle", r"\angle AB -> \angle BA"),
    ("dots", r"2,4,6,\ldots -> 2,4,6"), (r"[A-Z]{3}|(?<![\\{a-zA-Z])[a-z]{4}", "seat -> east")]
IS_MISREAD = re.compile("|".join(pattern for pattern, _ in MISREAD))
PERCENTAGE = re.compile(r"((?:\d+/)?[\d.]+|(?:\d+ ?)?\\frac\{\d+\}\{\d+\})\\%")  # 5\%, 1/5\%, 2\frac{1}{5}\%
TEXT = re.compile(r"\\text\{([^{}]*)\}")
OPTION_LETTER = re.compile(r"\(?[A-J]\)?")
CHOSEN_OPTION = re.compile(r"""(?x)
    \ ? (?: (?i:option|choice)\  )? [(\[{]? ([A-J])  # the letter
    (?: [.)]\ ?[A-Z][a-z] .*                         # B. A sentence follows, which may name other options
      | (?: [).,:;?!*\]}](?!\w)                      # B) or B: seven
          | (?= \ [^=+*/^_<>] )                      # B because ..., but not B + 1
          | $ )
        (?: (?! (?<![\w'\\]) (?: [B-HJ]              # and no other letter in what follows,
                | [AI](?!\ [a-z]) ) (?![\w']) ) . )* )  # where A or I may be a word""")
BRACKETED = re.compile(r"[(\[][^()\[\]]*[)\]]")  # a point or an interval
PLAIN_NUMBER = re.compile(r"[+-]?(?=\.?\d)(\d{1,3}(,\d{3})+|\d*)(\.\d*)?")  # 11,111.5, 055, 5. or .5
ORDINARY_WORD = re.compile(r"""(?x)  # whose case does not count: Marcus and DNE, but not AB, CO and Mgh
    (?<![\\a-zA-Z]) (?: (?=\w*[aeiouyAEIOU]) (?: [A-Z][a-z]{2,} | [A-Z]{3,} )  # three letters and a vowel
                      | N[oO] | [AP]M ) (?![a-zA-Z_])                          # No, NO, AM and PM""")

def normalise(text):
    """The value with one spelling for each thing, still in LaTeX that math-verify reads."""
    for rules in RULES.values():
        for pattern, replacement, *_ in rules:
            text = re.sub(pattern, replacement, text)
    return " ".join(text.split())

def canonical(text):
    """Equal canonical forms of normalised values are equal answers. "3 5" keeps its space: it is not 35."""
    text = ORDINARY_WORD.sub(lambda word: word[0].lower(), TEXT.sub(r"\1", text))
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    return re.sub(r"\{(\w)\}", r"\1", text).rstrip(".")  # \frac{1}{2} and \frac12, 5_{4} and 5_4

def dimensions(text):
    """What a normalised value is measured in: [("meter", "1"), ("second", "2")] for 7 m/s^2."""
    powers = {None: "1", "sq": "2", "cu": "3"}
    found = [("%", "1")] if r"\%" in text else []
    for match in DIMENSION.finditer("".join(unit[0] for unit in UNIT.finditer(text))):
        before, name, power, behind = match.groups()
        found.append((MEASURES[name], power or powers[before or behind]))
    return found

def equal(answer, gold):
    """Are two normalised values equal?"""
    if OPTION_LETTER.fullmatch(canonical(gold)):  # multiple choice
        return CHOSEN_OPTION.sub(r"\1", TEXT.sub(r" \1 ", answer).strip()) == canonical(gold).strip("()")
    if canonical(answer) == canonical(gold):
        return True
    if any(a != g for a, g in zip(dimensions(answer), dimensions(gold))):
        return False  # cm and m, cm^2 and cm^3; km and km/h agree as far as both go
    bare_answer, bare_gold = UNIT.sub("", answer).strip(), UNIT.sub("", gold).strip()
    meanings = [r"\\frac{\1}{100}"]
    if (r"\%" in answer) != (r"\%" in gold):  # a sign on one side only may be left out, as a unit may
        meanings.append(r"\1 ")
    return any(equal_bare(PERCENTAGE.sub(meaning, bare_answer), PERCENTAGE.sub(meaning, bare_gold))
               for meaning in meanings)

def equal_bare(answer, gold):
    """Are two normalised values without units equal? Exact rules come first, then math-verify's opinion."""
    a, g = canonical(answer), canonical(gold)
    if ("=" in a) != ("=" in g):  # n = 52_8 and 52_8
        a, g = re.sub(r"^[a-zA-Z]=", "", a), re.sub(r"^[a-zA-Z]=", "", g)
    if a == g:
        return True
    if PLAIN_NUMBER.fullmatch(a) and PLAIN_NUMBER.fullmatch(g):  # 055, 11,111, .5
        return Decimal(a.replace(",", "")) == Decimal(g.replace(",", ""))
    if any(IS_MISREAD.search(value.rpartition("=")[2]) for value in (answer, gold)):
        return False
    if BRACKETED.fullmatch(a) and BRACKETED.fullmatch(g) and a[0] != g[0]:
        return False  # math-verify would take both [3, 1] and (3, 1) for points
    return sympy_equal(to_sympy(answer), to_sympy(gold))

def latex_to_sympy(text):
    """Sympy's expression of a text. x<1 \\lor x>3 is joined; a comma beside the word means the same."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    for operator, join in ((r"\lor", sympy.Or), (r"\land", sympy.And)):
        if operator in text:
            return join(*map(latex_to_sympy, text.replace(",", operator).split(operator)))
    return latex2sympy(text, is_real=True, conversion_config=ConversionConfig(lowercase_symbols=False))

@functools.lru_cache(1000)
def to_sympy(text):
    """A value as an expression of sympy. Letters keep their case; conditions on x become x = the set that
    they allow."""
    import sympy
    value = latex_to_sympy(text)
    inequalities = (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Ne)
    if not isinstance(value, (sympy.FiniteSet, sympy.And, sympy.Or)) or not value.atoms(*inequalities):
        return sympy.expand_log(value, force=True) if isinstance(value, sympy.Expr) else value
    if len(value.free_symbols) > 1:  # "x<2 and y<3" is a set of conditions, but "x<2 or y<3" stays as it is
        return sympy.FiniteSet(*value.args) if type(value) is sympy.And else value
    conditions = value.args if isinstance(value, sympy.FiniteSet) else [value]
    all_x = sympy.Reals, sympy.UniversalSet
    allowed = sympy.Or(*conditions).as_set()
    if allowed in all_x:  # a list of conditions: x<1, x>3 means "or", but x>1, x<3 means "and"
        allowed = sympy.And(*conditions).as_set()
    if allowed in (sympy.S.EmptySet, *all_x):
        raise ValueError("conditions that no x or that every x satisfies cannot be told apart")
    return sympy.Eq(*value.free_symbols, allowed, evaluate=False)

def sympy_equal(a, g):
    """Numbers are compared by their digits, everything else by math-verify, less what it wrongly takes for
    equal."""
    import sympy
    from math_verify import verify
    if all(getattr(x, "is_number", False) and x.is_finite for x in (a, g)):
        # math-verify's 6 decimals would make .0000672 = .0000674, its 15 digits 1/2^99 = 1/2^98.
        tolerance = 1.001e-6 if a.has(sympy.Float) or g.has(sympy.Float) else 1e-50  # 0.333333 is 1/3
        a, g = a.evalf(60), g.evalf(60)
        return bool(abs(a - g) <= tolerance * max(abs(a), abs(g)))
    # The set option: -2 <= x <= 7 is the interval [-2, 7].
    if not verify(g, a, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    # By name, because latex2sympy has a FiniteSet of its own, which keeps items that come several times.
    kinds = {type(x.rhs if isinstance(x, sympy.Eq) else x).__name__ for x in (a, g)}
    if "FiniteSet" not in kinds:
        return True
    if kinds & {"Tuple", "Interval"}:
        return False  # a set is neither the point nor the interval (1, 2)
    items = [sorted(map(str, x._unsorted_args)) for x in (a, g) if hasattr(x, "_unsorted_args")]
    counts = [[values.count(value) for value in values] for values in items]
    return len(counts) < 2 or counts[0] == counts[1]  # 1, 2, 2 is not 1, 1, 2

# math-verify runs in worker processes that can be killed, because its own alarm works in the main thread only
# and cannot stop C code (9^9^9^9). Workers start by exec: a fork would copy a trainer's CUDA and NCCL state.
# They are kept, because their start is slow. An answer's limit is CPU time, 15 times that of the worker's
# start (0.4 s), so that no verdict depends on the processor or its load. A comparison takes 0.01 to 0.6 s.
CPU_TIME_FACTOR = 15
WALL_SECONDS = 1000  # enough to start on a busy machine; the limit of CPU time ends an answer much earlier
WORKER_MEMORY = 4 << 30  # bytes of address space: a huge power must not take the trainer's memory
IDLE_WORKERS = []

def ask_worker(pair):
    """Are (answer, gold) equal? An answer that takes too long or ends the worker is wrong."""
    worker = None
    with contextlib.suppress(IndexError):  # no idle worker; another thread may just have taken the last
        worker = IDLE_WORKERS.pop()
    if worker is None or worker.poll() is not None:
        worker = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "worker"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,  # Ctrl-C does not reach workers
            env=os.environ | {"PYTHONHASHSEED": "0"})  # which decides sympy's order, and with it verdicts
    reply, is_ready = "", True
    with contextlib.suppress(OSError):  # killed from outside just now; no reason to end a training run
        print(json.dumps(pair), file=worker.stdin, flush=True)
        is_ready = select.select([worker.stdout], [], [], WALL_SECONDS)[0]
        reply = worker.stdout.readline() if is_ready else ""
    if reply:
        IDLE_WORKERS.append(worker)
        return json.loads(reply)
    worker.kill()
    status = worker.wait()  # below 0 if a signal ended it, such as that of the limit: the answer's fault
    check(is_ready, f"a grading worker did not answer within {WALL_SECONDS} seconds")
    check(status < 0, "a grading worker did not start (see above); is math-verify installed?")
    return False

def worker_main():
    """Reads pairs from stdin, one a line, and writes whether they are equal, until its parent ends."""
    import logging
    import resource
    import signal
    import math_verify  # noqa: F401  the slow imports come first: no pair pays for them
    from latex2sympy2_extended import latex2sympy2  # noqa: F401
    limit = CPU_TIME_FACTOR * time.process_time()
    logging.disable()
    replies = sys.stdout
    sys.stdout = sys.stderr  # a stray print must not look like a reply
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit)  # the kernel enforces it, even in C code
        is_equal = False
        with contextlib.suppress(Exception):  # a text that sympy cannot read is not the answer
            is_equal = bool(equal(*map(normalise, json.loads(line))))
        print(json.dumps(is_equal), file=replies, flush=True)

def grade_all(responses, golds, finished=None, workers=2):
    """The verdicts of many responses. Each distinct pair (answer, gold) is compared once."""
    found, right = [], {}
    finished = finished or [True] * len(responses)
    for response, gold, is_finished in zip(responses, golds, finished, strict=True):
        tail = response[max((tag.end() for tag in CLOSING.finditer(response)), default=0):]
        is_truncated = not is_finished or OPENING.search(tail) is not None
        gold = last_box(str(gold))[1] or clean(str(gold))  # a whole reference solution has it in its last box
        answers = (None, None, None) if is_truncated else find_answers(tail)
        answers += find_answers(response)[1:]
        right.update({(answer, gold): answer == gold for answer in answers})
        found.append((gold, is_truncated, *answers))
    pairs = sorted(pair for pair in right if pair[0] and not right[pair] and max(map(len, pair)) <= LONGEST)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        right.update(zip(pairs, pool.map(ask_worker, pairs)))
    return [Verdict(correct=right[answer, gold], answer=answer,
                    answer_only=right[line, gold], boxed_only=right[box, gold],
                    either_full_text=right[full_line, gold] or right[full_box, gold],
                    truncated=is_truncated, no_answer=answer is None and not is_truncated)
            for gold, is_truncated, answer, line, box, full_line, full_box in found]

def grade(response, gold, finished=True):
    """The verdict of one response. `gold` is the answer, or a reference solution with it in the last box."""
    return grade_all([response], [gold], [finished])[0]

# ------------------------------------------------------------------------------------------------- BENCHMARKS
BENCHMARKS = {  # name: hub id, configuration, split
    "math500": "HuggingFaceH4/MATH-500::test",
    "aime24": "HuggingFaceH4/aime_2024::train",
    "aime25": "math-ai/aime25::test",
    "gpqa_diamond": "Idavidrein/gpqa:gpqa_diamond:train",
    "mmlu": "cais/mmlu:all:test"}

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}  # the paper's

def load_benchmark(source, wrapper="math"):
    """[dict(problem, tools, answer, level or None, id)] of a benchmark, of a copy of one (math500=DIR), or of
    anything that opsdc.py takes as --data. Problems without a known answer are left out."""
    import opsdc
    name, _, copy = source.partition("=")
    hint = contextlib.nullcontext()
    if name in BENCHMARKS:
        hub_id, _, rest = BENCHMARKS[name].partition(":")
        source = f"{copy or hub_id}:{rest}"
        hint = blaming(f"benchmark {name} (if it is gated, accept its terms on its hub page; offline, give a "
                       f"copy: {name}=DIR)")
    with hint:
        check(re.search("[./]", source) or Path(source.partition(":")[0]).exists(),
              f"{source}: expected {', '.join(BENCHMARKS)}, a file, a folder or a hub ID")
        problems = [p for p in read_problems(source, *opsdc.WRAPPERS[wrapper]) if p["answer"] is not None]
        check(problems, f"{source}: expected a field answer, final_answer or solution, found none")
        for p in problems:
            ids = p.pop("ids")
            with blaming(f"{source}, row {p['number']}, unique_id, id or level"):
                p["level"] = ids["level"] if isinstance(ids["level"], int) else as_text(ids["level"]) or None
                p["id"] = as_text(ids["unique_id"]) or as_text(ids["id"]) or str(p["number"] - 1)
    times = collections.Counter(p["id"] for p in problems)
    for p in problems:
        number = p.pop("number")
        if times[p["id"]] > 1:  # MMLU counts in each subject
            p["id"] += f", row {number}"
    return problems

# ------------------------------------------------------------------------------------------------- GENERATION
def make_jobs(tokenizer, problems, samples, seed, instruction=None, thinking=True, wrapper="math"):
    """`samples` jobs for each problem: records that lack the response but have the ids of the prompt."""
    import opsdc
    jobs = []
    for p in problems:
        prompt = opsdc.prompt_ids(tokenizer, p["problem"], instruction, thinking, wrapper, p.get("tools"))
        job = {"id": p["id"], "problem": p["problem"], "level": p["level"], "gold": p["answer"],
               "prompt": prompt, "prompt_hash": short_hash(prompt),
               "problem_hash": short_hash(p["problem"], p["answer"])}
        jobs += [job | {"sample": i, "seed": int(short_hash(seed, p["id"], i), 16)} for i in range(samples)]
    return jobs

def make_records(tokenizer, jobs, outputs):
    """A graded record for each job from its output (ids, logprobs, finished)."""
    # The last id of a finished response ended it. It is not text, even if the tokenizer does not list it as
    # special.
    texts = [readable(tokenizer, job["prompt"], ids[:-1] if finished else ids)
             for job, (ids, _, finished) in zip(jobs, outputs, strict=True)]
    verdicts = grade_all(texts, [job["gold"] for job in jobs], [finished for _, _, finished in outputs])
    records = []
    for job, (ids, _, finished), text, verdict in zip(jobs, outputs, texts, verdicts):
        think_tokens = think_length(tokenizer, ids, text)
        record = {name: value for name, value in job.items() if name != "prompt"}
        record |= {"tokens": len(ids), "think_tokens": think_tokens, "answer_tokens": len(ids) - think_tokens,
                   "response": text, "finish_reason": "stop" if finished else "length"}
        records.append(record | verdict._asdict())
    return records

def grade_rollouts(rollouts, problems, tokenizer):
    """Sets `correct` of the rollouts whose problems have known answers."""
    known = [rollout for rollout in rollouts if problems[rollout.index].answer is not None]
    jobs = [{"prompt": problems[r.index].student, "gold": problems[r.index].answer} for r in known]
    records = make_records(tokenizer, jobs, [(r.ids, None, r.finished) for r in known])
    for rollout, record in zip(known, records):
        rollout.correct = record["correct"]

def readable(tokenizer, prompt, ids):
    """The text that is graded. It keeps think tags, which some tokenizers call special, and no other special
    tokens. A think block that the template opens in the prompt, as R1-Distill's, gets its opening tag."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    for token in tokenizer.all_special_tokens:
        if not OPENING.fullmatch(token) and not CLOSING.fullmatch(token):
            text = text.replace(token, "")
    opened = re.search(rf"(?:{OPENING.pattern})\s*\Z", tokenizer.decode(prompt[-16:]))
    return f"{opened[0].rstrip()}\n{text}" if opened else text

def think_length(tokenizer, ids, text):
    """The number of tokens up to the last closing think tag, including it. Without such a tag these are all
    tokens if a block was opened, otherwise none."""
    closed = list(CLOSING.finditer(text))
    if not closed:
        return len(ids) if OPENING.search(text) else 0
    tag = tokenizer.convert_tokens_to_ids(closed[-1][0])
    if tag in ids:
        return len(ids) - ids[::-1].index(tag)
    # The tag is spelled with several tokens; encoding the text again is off by about one token.
    return len(tokenizer.encode(text[:closed[-1].end()], add_special_tokens=False))

# ------------------------------------------------------------------------------------------------- STATISTICS
def grouped(records, column):
    """{value: its records} in the order of the values; records without a value are left out."""
    found = collections.defaultdict(list)
    for record in sorted(records, key=lambda record: str(record[column])):
        found[record[column]].append(record)
    return {value: group for value, group in found.items() if value is not None}

def mean(records, column):
    return statistics.fmean(record[column] for record in records)

def clustered_error(groups, column):
    """The standard error of the mean over problems, whose samples depend on each other; None for a single
    problem."""
    means = [mean(group, column) for group in groups]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None

def summarise(records):
    """Statistics of records with equally many samples of each problem. Shares are fractions of 1."""
    groups = list(grouped(records, "id").values())
    sizes = sorted({len(group) for group in groups})
    check(len(sizes) == 1, "expected equally many samples of each problem, found "
          f"{len(records)} records with {' or '.join(map(str, sizes)) or 'no'} samples")
    right = [record for record in records if record["correct"]]
    means = {column: mean(records, column) for column in (
        "answer_only", "boxed_only", "either_full_text", "truncated", "no_answer", "think_tokens",
        "answer_tokens", "tokens")}
    levels = {str(level): summarise([record | {"level": None} for record in group])
              for level, group in grouped(records, "level").items()}
    return {"problems": len(groups), "samples": len(groups[0]), "accuracy": mean(records, "correct"),
            "accuracy_se": clustered_error(groups, "correct"), **means,
            "tokens_se": clustered_error(groups, "tokens"),
            "tokens_median": statistics.median(record["tokens"] for record in records),
            "tokens_correct": mean(right, "tokens") if right else None, "levels": levels}

def paired(base, ours, draws=4000):
    """The reduction of tokens (1 - ratio of means) and the change of accuracy, each as (value, low, high)
    with a 95 % bootstrap interval. Problems are drawn, each with all its samples in both runs, because a
    problem that takes many tokens in one run does so in the other."""
    import numpy
    base, ours = grouped(base, "id"), grouped(ours, "id")
    check(base and base.keys() == ours.keys(), "expected two runs on the same problems")
    means = numpy.array([[mean(run[problem], column) for problem in base]
                         for column in ("tokens", "correct") for run in (base, ours)])  # [4, problems]
    check(means[0].any(), "the first run has no tokens at all: there is nothing to reduce")
    rng, count = numpy.random.default_rng(0), len(base)
    drawn = [means[:, rng.integers(count, size=count)].mean(1) for _ in range(draws)]
    # Of each row the first value is that of all problems, the others are those of the draws.
    base_tokens, our_tokens, base_right, our_right = numpy.array([means.mean(1), *drawn]).T

    def with_interval(values):
        return float(values[0]), *numpy.percentile(values[1:], [2.5, 97.5]).tolist()
    return {"reduction": with_interval(1 - our_tokens / base_tokens),
            "change": with_interval(our_right - base_right)}

# --------------------------------------------------------------------------------------------- COMPARING RUNS
MAY_DIFFER = ("model", "model_hash", "instruction", "template", "seed")  # in two comparable runs

def read_lines(path):
    """The rows of a .jsonl file. A last line without its end, which a killed process left, is dropped."""
    lines = path.read_text().split("\n")[:-1]
    return [load_json(line, f"{path}, line {number} (restore or move the file): ")
            for number, line in enumerate(lines, 1)]

def read_summary(directory):
    with blaming(f"{directory}: expected the --out folder of an evaluation, with its summary.json, found"):
        summary = json.loads(Path(directory, "summary.json").read_text())
        version = summary.get("settings", {}).get("version")
        check(version == VERSION, f"version {version} of eval.py, this is {VERSION}; evaluate again")
        return summary

def read_run(directory):
    """(settings, {benchmark: records}) of a finished evaluation."""
    summary = read_summary(directory)
    check(summary["finished"], f"{directory}: not finished; repeat its command, it goes on where it stopped")
    return summary["settings"], {
        name: read_lines(Path(directory, f"{name}.jsonl")) for name in summary["benchmarks"]}

def refuse_unless_comparable(base, ours, names):
    """Refuses two runs whose settings differ in more than MAY_DIFFER, or which have different problems."""
    (base_settings, base_records), (our_settings, our_records) = base, ours
    base_settings = base_settings | {"benchmarks": sorted(base_records)}
    our_settings = our_settings | {"benchmarks": sorted(our_records)}
    differ = [f"{name} is {value!r} and {our_settings.get(name)!r}" for name, value in base_settings.items()
              if name not in MAY_DIFFER and value != our_settings.get(name)]
    for name in base_records.keys() & our_records.keys():
        a, b = ({(record["id"], record["problem_hash"]) for record in records[name]}
                for records in (base_records, our_records))
        if a != b:
            differ.append(f"{name} has problems in the first only: {len(a - b)}, in the second only: "
                          f"{len(b - a)}, for example {min(a ^ b)[0]}")
    check(not differ, f"{names[0]} and {names[1]} cannot be compared: " + "; ".join(differ))

def markdown_table(header, rows):
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)

def in_percent(value, *interval, sign=""):
    """A share as a percentage, "12.3", or with its interval, "12.3 [11.0, 13.5]"."""
    text = "" if value is None else f"{100 * value:{sign}.1f}"
    return text + (f" [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]" if interval else "")

def contrast(base, ours):
    """[(level, statistics of base, statistics of ours, their paired differences)], "all" levels first."""
    by_level = grouped(ours, "level")
    parts = [("all", base, ours)]
    parts += [(level, records, by_level.get(level, [])) for level, records in grouped(base, "level").items()]
    return [(level, summarise(a), summarise(b), paired(a, b)) for level, a, b in parts]

def compare(args):
    check(len(args.directories) > 1, "compare needs the directories of at least two evaluations")
    base_dir, *directories = args.directories
    base_run, *runs = [read_run(directory) for directory in args.directories]
    for directory, run in zip(directories, runs):
        refuse_unless_comparable(base_run, run, (base_dir, directory))
    contrasts = {}
    for name, base in base_run[1].items():
        rows = []
        for label, (_, ours) in zip(directories, runs):
            contrasts[name, label] = contrast(base, ours[name])
            rows += [[label, level, a["problems"],
                      f"{in_percent(a['accuracy'])} -> {in_percent(b['accuracy'])}",
                      in_percent(*differences["change"], sign="+"),
                      f"{a['tokens']:.0f} -> {b['tokens']:.0f}", in_percent(*differences["reduction"])]
                     for level, a, b, differences in contrasts[name, label]]
        header = [name, "level", "problems", "accuracy, %", "change, points", "mean tokens", "reduction, %"]
        print(markdown_table(header, rows), end="\n\n")
    print(f"Base: {base_dir}. In brackets: 95 % paired bootstrap intervals over problems.")
    if args.plot:
        plot_compare(args.plot, args.directories, contrasts)
        print(f"wrote {args.plot}")

# --------------------------------------------------------------------------------------------------- PICTURES
def pyplot():
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")  # draws files and needs no screen
    return pyplot

def plot_compare(path, directories, contrasts):
    """A line for each benchmark from the base through the runs in their order; thin lines for its levels."""
    figure, ax = pyplot().subplots(figsize=(9, 6), layout="constrained")
    names = [Path(directory).name for directory in directories]
    labels = names if len(set(names)) == len(names) else directories
    for i, benchmark in enumerate(dict.fromkeys(name for name, _ in contrasts)):
        for parts in zip(*(contrasts[benchmark, directory] for directory in directories[1:])):
            level, base, *_ = parts[0]
            points = [base, *(ours for _, _, ours, _ in parts)]
            x = [point["tokens"] for point in points]
            y = [100 * point["accuracy"] for point in points]
            dx = [1.96 * (point["tokens_se"] or 0) for point in points]
            dy = [196 * (point["accuracy_se"] or 0) for point in points]
            is_whole = level == "all"
            ax.errorbar(x, y, dy, dx, color=f"C{i}", marker="o", capsize=3, elinewidth=0.8,
                        linewidth=3 if is_whole else 0.8, label=benchmark if is_whole else None)
            for note in zip(x, y, labels) if is_whole else [(x[-1], y[-1], level)]:
                ax.annotate(f"  {note[2]}", note[:2], rotation=30, rotation_mode="anchor")
    ax.set(xlabel="mean response tokens", ylabel="accuracy, %",
           title="from the base on, in the order given; thin: by level; bars: 95 %")
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=150)

PANELS = "response_tokens", "loss", "student_entropy", "accuracy", "grad_norm", "truncated"

def curves(args):
    """Draws the metrics of training runs over steps, with a dotted line where thetabar was refreshed."""
    figure, axes = pyplot().subplots(2, 3, figsize=(14, 7), layout="constrained")
    for i, directory in enumerate(args.directories):
        rows = read_lines(Path(directory, "metrics.jsonl"))
        for ax, metric in zip(axes.flat, PANELS):
            known = [row for row in rows if row.get(metric) is not None]
            ax.plot([row["step"] for row in known], [row[metric] for row in known], color=f"C{i}",
                    label=directory if metric == PANELS[0] else None)
            for row, following in zip(rows, rows[1:]):
                if following["teacher_age"] < row["teacher_age"]:
                    ax.axvline(row["step"] + 0.5, color=f"C{i}", linewidth=0.8, linestyle=":")
            ax.set(title=metric, xlabel="step")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(args.plot, dpi=90)
    print(f"wrote {args.plot}; dotted lines: the teacher was refreshed")

# ----------------------------------------------------------------------------------------------------- TOKENS
# A page that shows the divergence at every token of some responses, by the trainer's own functions
PAGE_START = """\
<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta name=color-scheme content="light dark"><title>What the loss sees</title><style>
body { max-width: 60rem; margin: auto; padding: 1rem 1rem 4rem; font: 15px/1.5 system-ui, sans-serif }
h2, pre, td, #bar { white-space: pre-wrap; overflow-wrap: anywhere }
pre, td, #bar { font: 13px/1.6 ui-monospace, monospace }
td, th { text-align: left; padding-right: 2rem; border-bottom: 1px solid #8886 }
span { background: rgb(240 100 0 / calc(80% * var(--shade))) }
span:hover, #bar { outline: 2px solid }
#bar { position: fixed; inset: auto 0 0; padding: .5rem 1rem; background: Canvas }
</style><script>
onmouseover = ({target: {dataset: {d, p, q, best}}}) => document.getElementById("bar").textContent =
  d ? `${d} nats   student p ${p}   teacher q ${q}   most likely: ${best}` : ""
</script><div id=bar>Point at a token.</div><h1>What the loss sees</h1><p>Shaded: where student and teacher
differ, by <span style=--shade:.1>0.02</span> <span style=--shade:.5>0.5</span> <span style=--shade:1>2
nats</span>.
"""

def token_options(argv):
    """The options of opsdc.py and three more."""
    import opsdc
    parser = opsdc.HfArgumentParser(opsdc.Config, allow_abbrev=False)
    parser.error = refuse_words
    parser.add_argument("--samples", type=int, default=4, help="number of responses")
    parser.add_argument("--given", action="store_true", help="show the responses in --data, which is a run's "
                        "samples.jsonl or an evaluation's records")
    parser.add_argument("--teacher", help="hub id or folder of the teacher's weights; default: --model")
    parser.set_defaults(out="tokens.html")
    return parser.parse_args(argv)

def read_responses(cfg, problems, tokenizer):
    """Rollouts of the first --samples rows of --data. A line of samples.jsonl has the ids that were sampled;
    a record of an evaluation has only the text, which is encoded again."""
    import opsdc
    places, rollouts = {short_hash(p.text): i for i, p in enumerate(problems)}, []
    for where, row in itertools.islice(read_rows(cfg.data), cfg.samples):
        with blaming(f"{where}: expected a line of samples.jsonl or a record of eval.py, found"):
            _, problem, _ = read_problem(row, where, *opsdc.WRAPPERS[cfg.wrapper])
            place = places.get(short_hash(problem))
            check(place is not None and "response" in row, "no response to one of the problems")
        text, finished = row["response"], row.get("finished", row.get("finish_reason") == "stop")
        if "finish_reason" in row:  # a record: undo what `readable` did
            text = text.removeprefix(readable(tokenizer, problems[place].student, []))
            text += tokenizer.eos_token if finished else ""
        ids = row.get("ids") or tokenizer.encode(text, add_special_tokens=False)
        rollouts.append(opsdc.Rollout(place, ids, [0.0] * len(ids), finished, row.get("correct")))
    return rollouts

def score_tokens(student, teacher, batch, tokenizer, cfg):
    """[(token, divergence, p, q, [(one of the teacher's three most likely tokens, its q)])] of every token of
    a batch, --loss_chunk tokens at a time."""
    import opsdc

    def log_probabilities(model, inputs):
        hidden = model(*inputs)  # [N, d]
        head = model.lm.get_output_embeddings().weight.to(opsdc.DTYPE).full_tensor().float().T
        for chunk in hidden.split(cfg.loss_chunk):
            yield opsdc.finish_logits(chunk.float() @ head, **student.logit_options)[0].log_softmax(-1)

    def quoted(token):
        return json.dumps(tokenizer.decode([token]), ensure_ascii=False)
    found = []
    for tokens, log_p, log_q in zip(batch.tokens.split(cfg.loss_chunk),
                                    log_probabilities(student, batch.student),
                                    log_probabilities(teacher, batch.teacher)):
        p, q = log_p.exp(), log_q.exp()
        nats, _ = opsdc.divergence_and_gradient(p, log_p, q, log_q, cfg.divergence)
        likeliest = q.topk(3)
        for i, token in enumerate(tokens.tolist()):
            names = map(quoted, likeliest.indices[i].tolist())
            best = list(zip(names, likeliest.values[i].tolist()))
            found.append((quoted(token), nats[i].item(), p[i, token].item(), q[i, token].item(), best))
    return found

def token_texts(tokenizer, ids):
    """The text of each token. Of a character that takes several tokens the last one has it, the others "". A
    token is decoded with those of the text before it, whose own text is then cut off."""
    found, before, since = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end])[len(tokenizer.decode(ids[before:since])):]
        is_whole = end == len(ids) or not text.endswith("\ufffd")
        found.append(text if is_whole else "")
        if is_whole:
            before, since = since, end
    return found

def as_html(text):
    return html.escape(str(text), quote=False).replace("'", "&#39;").replace("\r", "&#13;")

def render_page(tokenizer, problems, rollouts, scores, about):
    """The responses, with a shaded span for each token; a table of the tokens that carry most of the loss."""
    import opsdc
    page, nats_of = [PAGE_START, f"<p>{as_html(about)}\n"], collections.defaultdict(list)
    losses = collections.defaultdict(collections.Counter)  # {token: {the teacher's choice: its loss}}
    for rollout, weights, tokens in zip(rollouts, opsdc.token_weights(rollouts), scores):
        verdict = {None: "not graded", True: "right", False: "wrong"}[rollout.correct]
        page.append(f"<h2>{as_html(problems[rollout.index].text)}</h2>{len(tokens)} tokens, "
                    f"{statistics.fmean(nats for _, nats, *_ in tokens):.4g} nats/token, {verdict}\n<pre>")
        texts = token_texts(tokenizer, rollout.ids)
        for text, weight, (token, nats, p, q, best) in zip(texts, weights, tokens):
            nats_of[token].append(nats)
            losses[token][best[0][0]] += weight * nats
            names = as_html(", ".join(f"{choice} {chance:.3g}" for choice, chance in best))
            page.append(f"<span style=--shade:{min(1, math.sqrt(nats / 2)):.2f} data-d={nats:.6g} "
                        f"data-p={p:.3g} data-q={q:.3g} data-best='{names}'>{as_html(text)}</span>")
        page.append("</pre>\n")
    loss = sum(parts.total() for parts in losses.values())
    page.append(f"<h2>What carries most of the loss, {loss:.6g} nats/token</h2><table><tr><th>token<th>times"
                "<th>mean nats<th>% of the loss<th>the teacher's most likely there\n")
    for token, parts in sorted(losses.items(), key=lambda item: -item[1].total())[:20]:
        row = (token, len(nats_of[token]), f"{statistics.fmean(nats_of[token]):.3g}",
               in_percent(parts.total() / (loss or 1)), " ".join(best for best, _ in parts.most_common(3)))
        page.append(f"<tr><td>{'<td>'.join(map(as_html, row))}\n")
    return "".join(page) + "</table>\n"

def show_tokens(cfg):
    """Samples responses as the trainer's first step does, or reads them; computes their loss as it does."""
    import opsdc
    device = opsdc.start_processes()
    check_settings(vars(cfg))
    out = Path(cfg.out)
    check(not out.exists() or PAGE_START[:200] == out.read_text("utf-8", "replace")[:200],
          f"--out {out}: expected a new file, or an older page")
    bases = [opsdc.open_base(name, to_train=True) for name in (cfg.model, cfg.teacher) if name]
    tokenizer, instruction = bases[0].tokenizer, opsdc.read_instruction(cfg.instruction)
    check(bases[-1].tokenizer.get_vocab() == tokenizer.get_vocab(), f"--teacher {cfg.teacher}: expected the "
          f"tokens of {cfg.model}, found others")
    problems = from_rank_0(opsdc.make_problems, cfg, bases[0], instruction)
    rollouts, longest = None, cfg.max_prompt_tokens + cfg.max_response_tokens
    if cfg.given:
        rollouts = read_responses(cfg, problems, tokenizer)
        longest = max(len(prompt) + len(r.ids) for r in rollouts
                      for prompt in (problems[r.index].student, problems[r.index].teacher))
    context = min(map(context_of, bases))
    check(longest <= context, f"expected at most the model's context, {context} tokens, found responses that "
          f"take {longest} with their prompt: lower --max_response_tokens, or leave those in --data out")
    if opsdc.dist.get_rank() == 0:
        for base in bases:
            base.loaded = opsdc.read_weights(base)
    engine = None if rollouts else opsdc.RolloutEngine(bases[0], cfg)
    models = [opsdc.load_model(base, device, cfg) for base in bases]
    if engine:
        engine.sync(models[0])
        indices = opsdc.batch_at(len(problems), 0, cfg.samples, cfg.seed)
        rollouts = opsdc.sample_rollouts(engine, problems, indices, 1, tokenizer, cfg)
        engine.sleep()
    with opsdc.torch.no_grad():
        scores = [score_tokens(models[0], models[-1], batch, tokenizer, cfg) for rollout in rollouts
                  for batch in opsdc.make_micro_batches([rollout], problems, device, cfg)]
    about = f"Student: {cfg.model}. Teacher: {cfg.teacher or 'the same model'}, with: {instruction}"
    if opsdc.dist.get_rank() == 0:
        out.write_text(render_page(tokenizer, problems, rollouts, scores, about), "utf-8")
        print(f"wrote {out}")

# ------------------------------------------------------------------------------------------------- EVALUATION
def write_summary(out, settings, benchmarks, finished):
    """Writes summary.json, in which the benchmarks of earlier commands stay."""
    import opsdc
    older = read_summary(out)["benchmarks"] if (out / "summary.json").exists() else {}
    summary = {"settings": settings, "finished": finished, "benchmarks": older | {
        name: summarise(records) for name, records in benchmarks.items()}}
    opsdc.replace_file(out / "summary.json", json.dumps(summary, indent=1))
    return summary

def merge_parts(out, name, jobs):
    """On rank 0: puts the records of a benchmark into one file, in the order of `jobs`, also those in the
    parts that a killed run left, on however many ranks. Returns the jobs that lack a record."""
    import opsdc

    def key_of(record):
        return record.get("id"), record.get("sample"), record.get("problem_hash")
    file = out / f"{name}.jsonl"
    paths = [p for p in out.glob("*.jsonl") if re.fullmatch(re.escape(name) + r"(\.rank-\d+)?", p.stem)]
    found = {key_of(record): json.dumps(record) + "\n" for path in paths for record in read_lines(path)}
    check(found.keys() <= {*map(key_of, jobs)}, f"--out {out}: {file.name} has records of other problems; "
          "give another folder")
    opsdc.replace_file(file, "".join(found[key_of(job)] for job in jobs if key_of(job) in found))
    for part in {*paths} - {file}:
        part.unlink()
    return [job for job in jobs if key_of(job) not in found]

def prepare_evaluation(args):
    """Makes all checks and reserves the folder. (base, {benchmark: jobs}, settings, folder, {benchmark: jobs
    that are left to do}, the Config of the engine)."""
    import opsdc
    check_settings(vars(args))
    if args.instruction is not None:
        args.instruction = opsdc.read_instruction(args.instruction)
    base, jobs = opsdc.open_base(args.model, to_train=False), {}
    for source in [args.data] if args.data else args.benchmarks.replace(" ", "").split(","):
        name = Path(source.partition("=")[0]).stem
        if name in jobs:  # another source of the same name
            name += f"-{len(jobs) + 1}"
        problems = from_rank_0(load_benchmark, source, args.wrapper)
        jobs[name] = make_jobs(base.tokenizer, problems, args.samples, args.seed, args.instruction,
                               args.thinking, args.wrapper)
    prompts = [(job["prompt"], job["id"]) for group in jobs.values() for job in group]
    opsdc.check_ids(base, [prompt for prompt, _ in prompts])
    say(f"the first prompt:\n{base.tokenizer.decode(prompts[0][0])}")
    longest, problem = max((len(prompt), name) for prompt, name in prompts)
    context = context_of(base, to_train=False)
    check(longest + args.max_tokens <= context, f"the prompt of problem {problem} has {longest} tokens, and "
          f"{args.model} holds {context}: lower --max-tokens {args.max_tokens}, or leave that problem out")
    cfg = opsdc.Config(model=args.model, max_prompt_tokens=longest, max_response_tokens=args.max_tokens,
                       seed=args.seed, vllm_tp=args.vllm_tp, vllm_memory=args.vllm_memory)
    settings = {"version": VERSION, "model": args.model, "model_hash": opsdc.model_hash(base),
                "template": short_hash(base.tokenizer.chat_template)}
    for name in (*SAMPLING, "max_tokens", "samples", "seed", "thinking", "wrapper", "instruction"):
        settings[name] = getattr(args, name)
    model_name = os.path.basename(os.path.abspath(args.model))  # abspath: the model may be `..`
    out = Path(args.out or f"eval-{model_name}" + ("-concise" if args.instruction else ""))
    names = "|".join(map(re.escape, jobs))
    claim_folder(out, "eval.lock",
                 rf"opsdc\.lock|summary\.json|{opsdc.UNFINISHED}|({names})(\.rank-\d+)?\.jsonl")
    found = read_summary(out)["settings"] if (out / "summary.json").is_file() else settings
    differ = [f"{name}: there {found.get(name)!r}, here {value!r}" for name, value in settings.items()
              if name != "model" and found.get(name) != value]  # a copy elsewhere has the same model_hash
    check(not differ, f"--out {out} holds another run ({'; '.join(differ)}); give another directory")
    todo = {name: from_rank_0(merge_parts, out, name, jobs[name]) for name in jobs}
    return base, jobs, settings, out, todo, cfg

def start_engine(base, cfg):
    """A RolloutEngine with the weights that `base` names. vLLM looks for weights by patterns. Where it would
    find none (brackets in the folder's name) or others, it gets a folder of links to the right files."""
    import opsdc
    found = list(base.folder.glob("*.safetensors")) or list(base.folder.glob("*.bin"))
    if set(found) == set(base.weight_files) and not glob.has_magic(str(base.folder)):
        return opsdc.RolloutEngine(base, cfg, load_format="auto")
    with tempfile.TemporaryDirectory() as links:
        for path in [*map(base.folder.joinpath, base.files), *base.weight_files]:
            link = Path(links, path.relative_to(base.folder))
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.absolute())
        return opsdc.RolloutEngine(dataclasses.replace(base, folder=Path(links)), cfg, load_format="auto")

def sample_and_write(engine, tokenizer, jobs, path, settings, block):
    """Appends the records of `jobs` to `path` as their responses end: whenever there are `block` of them or
    two minutes have passed. A rank that helps another's engine has no path."""
    import opsdc
    from vllm import SamplingParams
    sampling = {name: settings[name] for name in (*SAMPLING, "max_tokens")}
    params = [SamplingParams(**sampling, seed=job["seed"], logprobs=0, detokenize=False) for job in jobs]
    queued = engine.llm.enqueue([{"prompt_token_ids": job["prompt"]} for job in jobs], params, use_tqdm=False)
    job_of = {name.partition("-")[0]: job for name, job in zip(queued, jobs)}  # outputs lack vLLM's suffix
    pending, since, count = [], time.monotonic(), 0
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.llm.llm_engine.step():
            pending.append((job_of[output.request_id], opsdc.sampled(output.outputs[0])))
        is_last = not engine.llm.llm_engine.has_unfinished_requests()
        if path and pending and (len(pending) >= block or is_last or time.monotonic() - since > 120):
            records = make_records(tokenizer, *zip(*pending))
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            pending, since, count = [], time.monotonic(), count + len(records)
            say(f"{path.stem}: {count} of {len(jobs)} samples; the last {len(records)}: accuracy "
                f"{in_percent(mean(records, 'correct'))} %, {mean(records, 'tokens'):.0f} tokens")

def evaluate(args):
    import opsdc
    opsdc.start_processes()
    base, jobs, settings, out, todo, cfg = prepare_evaluation(args)
    rank, engine, done = opsdc.dist.get_rank(), None, {}
    if rank == 0:
        write_summary(out, settings, {}, finished=False)
    for name, left in todo.items():
        say(f"{name}: {len(left)} of {len(jobs[name])} samples are left to make")
        if left:
            engine = engine or start_engine(base, cfg)
            path = out / f"{name}.rank-{rank}.jsonl" if rank % cfg.vllm_tp == 0 else None
            sample_and_write(engine, base.tokenizer, engine.share(left), path, settings, args.block)
        opsdc.dist.barrier()  # all ranks have written before one reads
        if rank == 0:
            missing = merge_parts(out, name, jobs[name])
            check(not missing, f"--out {out}: {len(missing)} of {len(jobs[name])} samples of {name} have no "
                  "record; repeat the command, which makes them")
            done[name] = read_lines(out / f"{name}.jsonl")
    if rank == 0:
        print_table(write_summary(out, settings, done, finished=True))
        print(f"wrote {out}/summary.json")

def print_table(summary):
    """Prints a column for each benchmark in summary.json. Shares are in %."""
    found = summary["benchmarks"]

    def cell(name, value):
        is_number = isinstance(value, int) or "tokens" in name and value is not None
        return round(value, 1) if is_number else in_percent(value)
    names = [name for name in next(iter(found.values())) if name != "levels"]
    rows = [[name, *(cell(name, benchmark[name]) for benchmark in found.values())] for name in names]
    print(markdown_table(["in %, or tokens", *found], rows))

# ----------------------------------------------------------------------------------------------- COMMAND LINE
NUMBER_OPTIONS = {  # option: default, help
    "samples": (8, "samples of each problem"), "max-tokens": (30000, "longer responses are truncated"),
    "temperature": (SAMPLING["temperature"], "sampling temperature"),
    "top-p": (SAMPLING["top_p"], "tokens are sampled from this share of the probability"),
    "top-k": (SAMPLING["top_k"], "tokens are sampled from this number of the most likely ones, 0: from all"),
    "seed": (0, "decides the sampling"),
    "vllm-tp": (1, "ranks that share one vLLM engine (tensor parallelism)"),
    "vllm-memory": (0.9, "share of each GPU's memory for vLLM, which has it to itself here"),
    "block": (128, "samples that are graded and written together, or as many as end within two minutes")}

def parse_args(argv):
    """(the options, the function that runs the command)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("What counts")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse_words
    add = parser.add_argument
    if argv[:1] in (["compare"], ["curves"]):
        add("command")
        add("directories", nargs="+")
        add("--plot", required=argv[0] == "curves", help="FILE.png")
        return parser.parse_args(argv), {"compare": compare, "curves": curves}[argv[0]]
    if argv[:1] == ["tokens"]:
        return token_options(argv[1:]), show_tokens
    for name, (value, text) in NUMBER_OPTIONS.items():
        add(f"--{name}", type=type(value), default=value, help=f"{text} (default: {value})")
    add("--benchmarks", default="math500,aime24,aime25", help=f"{', '.join(BENCHMARKS)}; NAME=DIR: a copy")
    add("--model", required=True, help="hub id or directory")
    add("--data", help="as for opsdc.py, with answers; replaces the benchmarks")
    add("--out", help="directory of the records and the summary")
    add("--instruction", help="as for opsdc.py: gives the baseline with a concise prompt")
    add("--wrapper", choices=("math", "none"), default="math", help="as for opsdc.py")
    add("--thinking", action=argparse.BooleanOptionalAction, default=True)
    # --max_tokens is taken for --max-tokens
    words = [re.sub(r"^--\w+", lambda option: option[0].replace("_", "-"), word) for word in argv]
    return parser.parse_args(words), evaluate

def refuse(error):
    """Joins the group of processes, in which an error that all ranks found is printed once; raises it."""
    import opsdc
    opsdc.start_processes()
    raise error

def main(argv):
    if argv == ["worker"]:
        return worker_main()
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # `python -P` does not look there
    try:
        args, command = parse_args(argv)
        if command in (compare, curves):
            return command(args)
        import opsdc
    except (ValueError, OSError) as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            sys.exit(f"eval.py: {error}")
        import opsdc
        args, command = error, refuse
    except ModuleNotFoundError as error:
        hint = "it belongs beside eval.py" if error.name == "opsdc" else f"pip install {error.name}"
        sys.exit(f"eval.py: {error}; {hint}")
    opsdc.run_and_exit(functools.partial(command, args))

if __name__ == "__main__":
    main(sys.argv[1:])
