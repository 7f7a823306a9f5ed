"""Measure a reasoning model: are its answers right, and how many tokens do they take?

    python eval.py --model ID_OR_PATH [--benchmarks math500,aime24 | --data FILE.jsonl] [--out DIR]
    torchrun --nproc_per_node 8 eval.py ...      the same on eight GPUs, each with its share of the samples
    python eval.py compare BASE_DIR OURS_DIR [OURS_DIR ...] [--plot FILE.png]
    python eval.py curves RUN_DIR [RUN_DIR ...] --plot FILE.png
    python eval.py tokens --model ID_OR_PATH --data FILE [--out FILE.html]      (what the loss sees)

What counts as right decides the figures: one model reads 54.5 on MATH-500 by its boxes alone, 93.0 by
either format. The rules here, of the text after the last </think> (or another family's closing tag):
    formats    the later of the last `Answer:` line that is not empty and the last \\boxed{} (an empty one
               hides those before it; \\boxed{2} and \\boxed{3} is a list); neither, or cut, is wrong
    text       must agree (7 million is not 7, nor 42 because ...; 10% loss is not 10% gain)
    units      may be left out (2m is not 2); where both sides have one, it must agree (7 cm is not 7 m)
    numbers    equal to 1e-6 where one side is a decimal (0.333 is not 1/3)
    percent    10% is 0.1; a sign on one side only may also go, as a unit may: 10% is 10, but never 1
    letters    their case counts (c is not C), but not in words; a choice names one letter
    lists      in any order, each item as often; (1, 2), 1, 2 and [1, 2) differ, 1, 2 and {1, 2} do not
Each record also holds the verdict of three other rules, to compare published figures like for like:
`answer_only`, `boxed_only`, and `either_full_text` (the paper's: either format, think block included).
Left out: models as graders, code and proofs, conversion of units and bases.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import fractions
import functools
import glob
import gzip
import hashlib
import html
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

VERSION = 5  # of the grading rules and of the files written; runs of different versions are not compared

# --------------------------------------------------------------------------------------------------- PROBLEMS
# Reading problems and their answers from data, for both scripts. What is not text in a problem is refused
# with its row's number: otherwise the str() of a list, or one turn of a conversation, would be trained on
# without a sign. An answer that is no value is unknown and counted, because training needs no answers.
# Names of fields are compared in lower case, with _ for a space.
PROBLEM_FIELDS = "problem", "prompt", "question", "messages"  # the first one that is filled is the problem
ANSWER_FIELDS = ("answer", "final_answer", "expected_answer", "correct_answer", "ground_truth", "solution",
                 "reward_model")  # the first one that is filled has the answer, or it is unknown
ID_FIELDS = "unique_id", "id", "level"
# Fields that say which option is right: all that are filled must mean the same one
GOLD_FIELD = ("(final_|expected_)?answer|ground_truth|gold|cop|label|correct|(correct|right)_?(answer|option|"
              "index|letter)|answer_?(index|idx|letter|key|text|label|option)")
WRONG_OPTION_FIELD = r"(incorrect|wrong)_answers?(_\d)?|distractors?_?\d?"
# Fields without which the words of a filled problem are not all of it, and signs of that in the words
MISSED_FIELD = (r"((decoded|question|problem|input)_)?(image|img|picture|figure|video|audio)s?(_?(\d+|path|"
                r"url|file|base64|bytes))?|(option|choice)[_-]?\d|body|passage|article")
MISSED_IN_TEXT = (r"(?i)!\[[^\]\n]*\]\([^)\n]+\)|<\|?(image|img|video|audio)[_ ]?(\d+|pad)?\|?>|"
                  r"\\includegraphics")
OTHER_FORMAT = (r"####|\\boxed\b|</?answer>|(?i:last line of (your|the) (response|answer)|"
                r"final answer (in|within|inside|after|as)\b)")
OPTION_LISTS = "options", "choices", "option_list", "choice_list", "answer_choices"
OPTION_FIELDS = [[start + letter for letter in "abcdefghij"]
                 for start in ("option_", "choice_", "answer_", "op", "")]
READ_FIELD = re.compile("|".join([*PROBLEM_FIELDS, *ANSWER_FIELDS, *sum(OPTION_FIELDS, []), GOLD_FIELD,
                                  WRONG_OPTION_FIELD, MISSED_FIELD, *OPTION_LISTS, "tools"]))

def say(text):
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)

def check(condition, message):
    if not condition:
        raise ValueError(message)

@contextlib.contextmanager
def blaming(where):
    """An error inside, whatever library raises it, becomes a ValueError that begins with `where`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: {str(error).strip() or repr(error)}".partition("\n")[0]) from error

def explain(error):
    """Why a command failed: a line for what the user can mend before the engine starts, else a traceback. A
    NameError of this code or of a fork keeps its traceback, though `blaming` names an input for it."""
    cause = error
    while isinstance(cause, (ValueError, OSError)) and cause.__cause__:
        cause = cause.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    ours = frames and frames[-1].f_globals["__name__"] in ("__main__", "opsdc", "eval")  # no library's
    if isinstance(error, SystemExit):
        print(error)
    elif isinstance(error, (ValueError, OSError)) and "vllm" not in sys.modules and (
            not ours or isinstance(cause, (ValueError, OSError))):
        print("error: " + " ".join(str(error).split()))
    else:
        sys.excepthook(type(error), error, error.__traceback__)

def refuse_words(message):  # in place of argparse's usage, which every rank would print
    raise ValueError(f"{message}; see --help")

def claim_folder(out, mark, files, results=""):
    """For this group of processes alone, until it ends. The file `mark` tells a run's folder. Without it
    nothing may be there that matches `files`, the run's own names; with it, nothing that matches `results`.
    Other things may be there."""
    from torch import distributed as dist
    token = [os.urandom(8).hex()]  # rank 0 writes its own into the mark, where all ranks must see it
    if dist.get_rank() == 0:
        with blaming(f"--out {out}: expected a new or empty folder or, with --resume, a run's, where no "
                     "other process is at work, found"):
            out.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in out.iterdir())
            check(out.name, "the present folder")
            taken = [name for name in names if re.fullmatch(results if mark in names else files, name)]
            check(not taken, ", ".join(taken[:4]))
            file = os.open(out / mark, os.O_CREAT | os.O_RDWR, 0o666)  # never closed: locked until we end
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                check(not isinstance(error, BlockingIOError), error.strerror)
                say(f"warning: {out} cannot be locked ({error.strerror}); start no other command there")
            os.ftruncate(file, 0)
            os.write(file, token[0].encode())
            os.fsync(file)
    dist.broadcast_object_list(token)
    sees = [None] * dist.get_world_size()
    dist.all_gather_object(sees, (out / mark).exists() and (out / mark).read_text() == token[0])
    check(all(sees), f"--out {out}: expected one folder that all nodes share, but rank "
          f"{sees.index(min(sees))} does not see what rank 0 wrote to {mark} there")

def load_json(text, where=""):
    with blaming(f"{where}expected a JSON object, found {text[:60]!r}"):
        return json.loads(text)

@functools.cache
def normal(field):
    return field.lower().replace(" ", "_")

@functools.cache
def is_read(field):  # Does it decide what is trained on? Rows that agree in all such fields are repeats.
    return READ_FIELD.fullmatch(normal(field)) is not None

# ---------- files, folders and the hub
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # as `datasets` calls them

def kind_of(path):  # x.csv.gz is a .csv
    return Path(path.name.lower().removesuffix(".gz")).suffix

def read_rows(source, is_wanted=None):
    """(where, row) of every row of a file, a folder of files or a data set of the hub. Of a table, fields for
    which is_wanted(field) is false come as None."""
    with blaming(f"{source}: expected a file .jsonl, .json, .csv (or a .gz of one) or .parquet, a folder of "
                 "these, in the encoding UTF-8, or of the hub ID[:CONFIG[:SPLIT]], found"):
        exists = os.path.exists(os.path.expanduser(source))  # then its colons are part of the name
        parts = [source] if exists else source.rsplit(":", 2)
        name, config, split = parts + [""] * (3 - len(parts))
        path, split = Path(name).expanduser(), split or "train"
        kind, files = kind_of(path), [path]
        if path.is_dir() and name:
            kind, files, arguments = open_folder(path, config, split)
        elif path.is_file():
            check(kind in KINDS, f"a file {path.suffix}")
            arguments = dict(path="parquet", data_files=glob.escape(str(path.parent.resolve() / path.name)))
        else:
            check(kind not in KINDS and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name),
                  f"No such file or folder: {path}")
            kind, arguments = "", dict(path=name, name=config or None)
        if KINDS.get(kind) in ("json", "csv"):
            rows = ((file, n, row) for file in files for n, row in enumerate(read_text(file), 1))
        else:
            rows = ((source, n, row) for n, row in enumerate(read_table(arguments, split, is_wanted), 1))
        for file, n, row in rows:
            yield f"{file}, row {n}", row

def read_text(path):
    """Rows of a .jsonl, .json or .csv or of a .gz of one. A .csv's values stay the texts that they are:
    `datasets` would make 55 of 055, and let a row with too many cells shift the columns."""
    csv.field_size_limit(1 << 30)
    open_as = gzip.open if path.name.lower().endswith(".gz") else open
    with open_as(path, "rt", encoding="utf-8-sig", newline="\n") as file:  # a line does not end at U+2028
        is_array = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        if kind_of(path) == ".csv":
            rows = csv.DictReader(file, strict=True)
        elif is_array:
            rows = load_json(file.read())
        else:
            rows = (load_json(line, f"{path.name}, line {n}, ")
                    for n, line in enumerate(file, 1) if line.strip())
        for n, row in enumerate(rows, 1):
            if not isinstance(row, dict) or None in row:
                raise ValueError(f"in row {n} no JSON object, or more cells than columns: {str(row):.60}")
            yield {normal(field): value for field, value in row.items()}

def open_folder(path, config, split):
    """(kind, the split's files, arguments that load it) of a folder; splits and configurations are those that
    `datasets` sees."""
    import datasets
    check(not any((path / name).exists() for name in ("state.json", "dataset_dict.json")),
          "a dataset that was saved using `save_to_disk`; use its to_parquet or to_json instead")
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    kinds = {kind_of(file) for file in files if not any(part.startswith(".") for part in file.parts)}
    kinds &= KINDS.keys()
    if kinds & {".csv", ".parquet"}:
        kinds.discard(".json")  # notes beside the data
    check(len(kinds) == 1, f"files {' and '.join(sorted(kinds)) or 'of no such kind'}; name one of them")
    kind, = kinds
    arguments = dict(path=str(path), name=config or None)
    if glob.has_magic(str(path.resolve())):  # brackets in its name
        arguments = dict(path=KINDS[kind], data_dir=glob.escape(str(path.resolve())))
    with in_one_line():
        found = datasets.load_dataset_builder(**arguments).config.data_files or {}
    name = split.partition("[")[0]
    check(name in found, f"no split {name}, but {', '.join(map(str, found))}; name it: {path}::SPLIT")
    return kind, [Path(file) for file in found[name] if kind_of(Path(file)) == kind], arguments

def read_table(arguments, split, is_wanted):
    """Rows of .parquet or the hub, in batches of Arrow's table: a tenth of the time of single rows."""
    import datasets
    with in_one_line():
        table = datasets.load_dataset(**arguments, split=split)
    table = table.rename_columns({field: normal(field) for field in table.column_names}).with_format("arrow")
    unread = dict.fromkeys(field for field in table.column_names if is_wanted and not is_wanted(field))
    table = table.remove_columns([*unread])
    fields = table.column_names
    for batch in table.iter(1000):
        for values in zip(*(column.to_pylist() for column in batch.columns)):
            yield unread | dict(zip(fields, values))

@contextlib.contextmanager
def in_one_line():
    """`datasets` says that an error occurred, and why in later lines or in another error."""
    try:
        yield
    except Exception as error:
        text = str(error).removeprefix("An error occurred while generating the dataset").strip()
        text = text or f"{error.__cause__ or error!r}"
        raise ValueError(" ".join(text.split())[:600]) from error

# ---------- a row's problem
def without_nulls(value):
    """In Arrow's tables each tool has the others' parameters as null: such keys are absent."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value

def is_filled(value):
    if isinstance(value, (dict, list)):
        return any(map(is_filled, value.values() if isinstance(value, dict) else value))
    return bool(value) and value == value and str(value).strip() not in ("", "[]", "{}")  # NaN: not itself

def is_turn(message):
    return isinstance(message, dict) and isinstance(message.get("role"), str) and (
        isinstance(message.get("content"), str)
        or message["role"] == "assistant" and bool(message.get("tool_calls")))

def as_problem(value, prefix="", suffix=""):
    """A text, or messages if there are several, without the prefix and suffix that the prompts will put
    around it. None if it is blank."""
    if isinstance(value, str):
        is_chat = re.fullmatch(r"(?s)\[?\s*\{.*[\"'](role|from)[\"']\s*:.*\}\s*\]?", value.strip())
        value = load_json(value) if is_chat else [{"role": "user", "content": value}]
    value = [] if value is None or value != value else without_nulls(value)
    check(isinstance(value, list) and all(map(is_turn, value)),
          f"expected a text, or messages with the texts role and content, found {value!r:.60}")
    json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair
    roles = [m["role"] for m in value]
    check(roles[-1:] != ["assistant"], f"expected the user's turn last, found {', '.join(roles)}")
    if not "".join([m["content"] for m in value if m["role"] == "user"][-1:]).strip():
        return None
    if prefix or suffix:
        def bare(text):
            return text.strip().removeprefix(prefix).removesuffix(suffix).strip()
        value = edit_last_user(value, bare)
    return value[0]["content"] if len(value) == 1 else value

def edit_last_user(messages, edit):
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return [m | {"content": edit(m["content"])} if i == last else m for i, m in enumerate(messages)]

class NotInWords(ValueError):
    """A part of the problem is in a picture or in another field."""

def read_problem(row, where, prefix="", suffix=""):
    """(field, problem, tools): {"prompt": prefix + "1+1?" + suffix} gives ("prompt", "1+1?", None)."""
    for field in PROBLEM_FIELDS:
        with blaming(f"{where}, field {field}"):
            problem = as_problem(row.get(field), prefix, suffix)
        if problem:
            break
    missed = [name for name in row if re.fullmatch(MISSED_FIELD, name) and is_filled(row[name])]
    missed += [found[0] for found in re.finditer(MISSED_IN_TEXT, str(problem))]
    if missed:
        raise NotInWords(f"{where}: expected a problem in words, found {', '.join(missed)}; take such rows "
                         "out")
    check(problem, f"{where}: expected a field problem, prompt or question, found {', '.join(row)}")
    with blaming(f"{where}, field tools"):
        tools = without_nulls(row.get("tools")) or None
        return field, problem, load_json(tools) if isinstance(tools, str) else tools

# ---------- a row's answer
# A gold that is no value: nothing is known by it, nor by the fields after it.
SENTINEL = re.compile(r"(?is)(?:the )?proof\b.*|see .{0,20}(?:proof|solution|above|below)\.?|n/?a|nan|"
                      r"none\.?|null|unknown\.?|(?:answer )?not ?(?:found|available|provided|given)\.?|"
                      r"no answer\.?|tbd|todo|[-?]+|assert .*|def \w+\(.*")
# A sentence ends here, but not behind St., Dr., U.S., a.m. or approx.
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z]\w)(?<!\b[A-Z]\w\w)(?<!\b[A-Z]\w{3})(?<!\b\w\.\w)"
                          r"(?<!\bapprox)(?<!\b(?:vs|cf|ca))[.!?]\s+(?=[A-Z\\$(])|[。！？]")
PLAIN_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|[\u3040-\u9fff]")

def as_text(value):  # of a text, number or boolean; "" if it is missing or blank
    check(isinstance(value, (str, int, float, type(None))), f"expected a text, found {value!r:.60}")
    if value is None or value != value:  # NaN: a table's missing number
        return ""
    return format(Decimal(str(value)), "f") if isinstance(value, float) else str(value).strip()

def gold_text(value):
    """(text, why there is none) of a gold. It comes after GSM8K's ####, in a solution's last box, or is all
    of it; of ["2"] and '["2"]' it is 2. Test cases are no text."""
    if isinstance(value, str) and re.match(r"\s*[\[{]\s*[\[{]?\s*[\"']", value):  # ["2"]; not [0, 1)
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        value = None if value == "" else [] if isinstance(value, str) else value
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, (str, int, float, type(None))):
        return "", f"{value!r:.40} is no text"
    text = as_text(value)
    return last_box(text)[1] or text.rpartition("####")[2].strip(), ""

def why_no_value(text):
    """Why a gold's text is no value, or "". Several sentences, or more than 25 words, are a proof."""
    words = len(PLAIN_WORD.findall(text))
    if SENTINEL.fullmatch(text):
        return f"{text[:40]!r} is no value"
    return f"{text[:40]!r} is a text of {words} words" if words > 25 or (
        words >= 5 and SENTENCE_END.search(text)) else ""

def read_answer(row):
    """(field, known answer, "") of a row, or (None, None, why it has none). A solution in words, without a
    box or ####, is passed over. {"reward_model": {"ground_truth": 2}} gives ("reward_model", "2", "")."""
    for field in ANSWER_FIELDS:
        value = row.get(field)
        if field == "reward_model" and value:
            with contextlib.suppress(ValueError):
                value = json.loads(value) if isinstance(value, str) else value
            if not isinstance(value, dict):
                return None, None, f"{field}: {value!r:.40} has no ground_truth"
            value = value.get("ground_truth")
        text, why = gold_text(value)
        if (text or why) and not (field == "solution" and " " in text and text == str(value).strip()):
            why = why or why_no_value(text)
            return (None, None, f"{field}: {why}") if why else (field, text, "")
    return None, None, "no answer"

# ---------- questions with options
# The options keep their order and their letters, because some refer to others ("Both A and B"). Only where
# the fields themselves tell the right option from the wrong ones, as GPQA's do, they are shuffled.
LETTERS = [*"ABCDEFGHIJ"]

def read_options(row):
    """(fields, labels, options, are they shuffled) of a question with options. Without: no options."""
    for field in OPTION_LISTS:
        if row.get(field):
            found = load_json(row[field]) if isinstance(row[field], str) else row[field]
            if isinstance(found, dict) and "text" in found:  # ARC
                return [field], [*map(str, found["label"])], found["text"], False
            if isinstance(found, dict):  # MedQA
                labels = [label for label in sorted(found) if found[label] is not None]
                return [field], labels, [found[label] for label in labels], False
            check(isinstance(found, list), f"expected a list of options, found {found!r:.60}")
            return [field], LETTERS, found, False
    for fields in OPTION_FIELDS:
        fields = [field for field in fields if field in row]
        if len(fields) >= 4 or len(fields) >= 2 and len(fields[0]) > 1:  # a, b alone may be anything
            return fields, LETTERS, [row[field] for field in fields], False
    wrong = [field for field in sorted(row) if re.fullmatch(WRONG_OPTION_FIELD, field)]
    if wrong and is_filled(row.get("correct_answer")):
        options = [row["correct_answer"]]
        for field in wrong:
            options += row[field] if isinstance(row[field], list) else [row[field]]
        return ["correct_answer", *wrong], LETTERS, options, True
    return [], LETTERS, [], False

def places_of(gold, labels, options):
    """Places of the options that a gold may mean. A number is a label, or a place from 0. A text is an
    option, a label, both, or a place: 2, "Paris", "(C)", "C. Paris" and "2"."""
    places = labels if labels[0].isdigit() else [str(place) for place in range(len(options))]
    text = gold_text(gold)[0]
    if isinstance(gold, (int, float)) and text.removesuffix(".0") in places:
        return [places.index(text.removesuffix(".0"))]
    bare = [option.strip("()[]. :").lower() for option in (text, *options)]
    for wanted, among in ((text, options), (bare[0], bare[1:])):
        if wanted in among:
            return [place for place, option in enumerate(among) if option == wanted]
    named = re.fullmatch(r"(?s)(?:(?:the )?(?:option|choice|answer)(?: is)?:? )?(\w)(?:[).:]+\s*(.+))?",
                         bare[0])
    for names in (labels, places):
        if named and named[1].upper() in names[:len(options)]:
            place = names.index(named[1].upper())
            return [place] if named[2] in (None, bare[1 + place]) else []
    return []

def find_gold(row, labels, options):
    """(fields that say which option is right, its place, "") or (fields, None, why it is unknown)."""
    fields = [field for field in row if re.fullmatch(GOLD_FIELD, field) and row[field] not in (None, "", [])]
    places = [*range(len(options))] if fields else [None]
    for field in fields:
        found, (text, why) = places_of(row[field], labels, options), gold_text(row[field])
        if not found and (why or text in ("", "-1") or SENTINEL.fullmatch(text)):
            return fields, None, f"{field}: {why or repr(text) + ' is no value'}"
        check(found, f"expected as {field} the letter, text or place of an option, found {row[field]!r:.60}")
        places = [place for place in places if place in found]
        check(places, "expected fields that mean the same option, found "
              + ", ".join(f"{name} {row[name]!r:.40}" for name in fields))
    return fields, places[0], "" if fields else "no answer"

def letter_options(row, problem, question):
    """(problem with its options lettered, letter of the right one or None, why that is unknown, fields of the
    options, of the answer). The question's text decides how options are shuffled."""
    fields, labels, options, shuffled = read_options(row)
    options = [as_text(option) for option in options]
    padding = ("", "N/A") if options.count("N/A") > 1 else ("",)
    while options and options[-1] in padding:  # as MMLU-Pro's
        options.pop()
    if not options:
        return problem, None, "", [], []
    check(1 < len(options) <= len(LETTERS) and all(options),
          f"expected a question and two to ten texts to choose from, found {options!r:.80}")
    golds, place, why = ([], 0, "") if shuffled else find_gold(row, labels, options)
    order = list(range(len(options)))
    if shuffled:
        random.Random(digest(question)).shuffle(order)
    lines = ["", "Answer with the letter of the correct option."]
    lines += [f"({letter}) {options[i]}" for letter, i in zip(LETTERS, order)]

    def lettered(text):
        return "\n".join([text.strip(), *lines])
    problem = lettered(problem) if isinstance(problem, str) else edit_last_user(problem, lettered)
    return problem, None if place is None else LETTERS[order.index(place)], why, fields, golds

# ---------- all rows
def read_row(row, where, prefix="", suffix=""):
    """dict(problem, tools, answer) of a row, why it has no answer, {field: what it is read as}."""
    field, problem, tools = read_problem(row, where, prefix, suffix)
    with blaming(f"{where}, a question with choices"):
        problem, answer, why, options, golds = letter_options(row, problem, row[field])
    if not options:
        gold, answer, why = read_answer(row)
        golds = [gold] if gold else []
    uses = {field: "problem"} | dict.fromkeys(options, "options") | dict.fromkeys(golds, "answer")
    if tools:
        uses["tools"] = "tools"
    return dict(problem=problem, tools=tools, answer=answer), why, uses

def read_problems(source, prefix="", suffix=""):
    """[dict(problem, tools, answer, ids, number)], each problem once, with its first known answer. A row that
    says nothing new is skipped before it is parsed: DAPO repeats each of its 17,000 problems 100 times."""
    say(f"reading {source} ...")
    found, fields, uses, reasons, seen, missed, formats = {}, {}, {}, {}, set(), [], []
    number = others = 0

    def is_wanted(field):
        return is_read(field) or normal(field) in ID_FIELDS
    for number, (where, row) in enumerate(read_rows(source, is_wanted), 1):
        fields.update(row)
        row_hash = hash(pickle.dumps([(field, row[field]) for field in row if is_read(field)]))
        if row_hash in seen:  # of two million rows two have the same by chance once in ten million runs
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
            found[key], reasons[key] = problem | dict(ids=ids, number=number), f"{where}, {why}"
            if (prefix or suffix) and re.search(OTHER_FORMAT, str(problem["problem"])):
                formats.append(where)
        elif problem["answer"] is not None:
            others += found[key]["answer"] not in (None, problem["answer"])
            if found[key]["answer"] is None:
                found[key]["answer"] = problem["answer"]
    check(not missed, f"{''.join(missed[:1])} ({len(missed)} of {number} rows, repeats aside)")
    unknown = [reasons[key] for key in found if found[key]["answer"] is None]
    say(f"{source}: {number} rows, {len(found)} problems, {len(unknown)} without a known answer, {others} "
        f"again with another; {number - len(found)} rows were repeats; "
        f"{''.join(f'the first without an answer: {reason}; ' for reason in unknown[:1])}"
        f"read: {', '.join(f'{name} as {use}' for name, use in uses.items())}; "
        f"not read: {', '.join(name for name in fields if name not in uses)}")
    if formats:
        say(f"{len(formats)} prompts ask for a format of their own ({formats[0]} is the first), and get that "
            "of --wrapper math too; --wrapper none takes them as they are")
    return list(found.values())

# ---------------------------------------------------------------------------------------------------- GRADING
# First half: find the answer. All is linear in the text: a megabyte of brackets must not hang.
# Think blocks of most families, Seed and EXAONE; Mistral; Cohere; Gemma 4. What follows the last one counts.
OPENING = re.compile(r"<(?:\w{1,9}:)?(?:think|thought)>|\[THINK\]|<\|START_THINKING\|>|<\|channel>")
CLOSING = re.compile(r"</(?:\w{1,9}:)?(?:think|thought)>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>")
SPECIAL = re.compile(r"<[|｜][^<>\n]{1,40}[|｜]>|</?s>|</answer>|<eos>|<pad>|<end_of_turn>")  # left over
MARKER = re.compile(r"""(?xm)  # what comes before an answer
    (?: ^[ \t>*_#`$-]* (?i: (?:the\ |my\ )?(?:final\ |correct\ )?answer )    # in any case where a line starts
      | \b(?:Answer|ANSWER) ) [ \t*_`]{0,8} [:：]                            # elsewhere only with a capital
      (?: \ ?[Tt]he\ [\w ]*(?:answer|option|choice)\ is\b )?                 # Answer: The correct option is B
  | \b[Ff]inal\ answer\ is\b :? (?= [^\n]{1,400}I\ hope\ it\ is\ correct )   # the words of Minerva's prompt
    """)
SPANS = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "$\n": "$"}  # maths that may go over several lines
GAP = re.compile(r"""(?x)  # what may stand between boxes that are one list
    (?: [\s,;$&~*] | \\[\[\]()\\,;:!\ ] | \\q?quad                   # spaces, commas, the ends of formulas
      | \b(and|or)\b                                                 # a word, bare
      | \\(?:text|mathrm)\{ [\s,]{0,9} (and|or)? [\s,]{0,9} \} )*    # or in \text
    """)
LONGEST = 1000  # characters of an answer that is still looked at; the longest gold of MATH-500 has 53

class Verdict(NamedTuple):
    correct: bool
    answer: str | None      # as extracted, None if there is none
    answer_only: bool       # the three other rules, see the top of this file
    boxed_only: bool
    either_full_text: bool
    truncated: bool         # cut at the token limit, or still inside a think block
    no_answer: bool         # ended by itself, but in neither format

def last_answer_line(text):
    """(start of the last `Answer:` that has a value, the value), or (-1, None)."""
    for marker in reversed(list(MARKER.finditer(text))):
        rest = text[marker.end():marker.end() + 4 * LONGEST].lstrip(" \t\n*_`}")  # or on the next line
        closing = SPANS.get(rest[:2]) or ("\\end{" if "\\begin{" in rest.partition("\n")[0] else "")
        end = max(0, rest.find(closing, 2)) if closing else 0
        value = clean(rest[:end] + rest[end:].partition("\n")[0])  # "$5$ or $6$" stays whole
        if value:
            return marker.start(), value
    return -1, None

def last_box(text):
    """(end of the last balanced \\boxed{}, its content), or (-1, None). Boxes in a row are one list."""
    stack, boxes = [], []  # one pass with a stack of open braces: unbalanced ones cost nothing
    for token in re.finditer(r"\\f?box(?:ed)?\s*\{|\\boxed\s*[-+]?\d+(?:[.,/]\d+)*|\\.|[{}]", text):
        start, end = token.span()
        if token[0][-1].isdigit():  # no braces needed; `\\.` eats \{ and \}
            boxes.append((start, start + len("\\boxed"), end, end))
        elif token[0] == "}" and stack:
            opened, content, is_box = stack.pop()
            while is_box and boxes and boxes[-1][0] > opened:  # \boxed{\boxed{2}}
                boxes.pop()
            boxes += [(opened, content, start, end)] * is_box
        elif token[0].endswith("{") and token[0] != "\\{":
            stack.append((start, end, token[0] != "{"))
    found, following = [], None  # value, joint, value, ... from the last one backwards
    for start, content, end, after in reversed(boxes[-LONGEST:]):
        value = clean(MARKER.sub("", text[content:end][:4 * LONGEST]))
        gap = GAP.fullmatch(text, after, following) if found else None
        if not value or found and not gap:  # an empty box hides those before it
            break
        word = gap and (gap[1] or gap[2])
        found += [f" {word} " if word else ", "] * bool(found) + [value]
        following = start
    found = found[:1] if len(set(found[::2])) == 1 else found[::-1]  # the same said twice is one
    return boxes[-1][2] if boxes else -1, "".join(found) or None

def find_answers(text):
    """Values by three rules: the later of the two formats, the `Answer:` line alone, the box alone."""
    (line_at, line), (box_at, box) = last_answer_line(text), last_box(text)
    return box if box is not None and box_at > line_at else line, line, box  # a box in the line is later

def clean(text):
    """The bare value: no special tokens, Markdown, maths delimiters or trailing punctuation."""
    text = re.sub(r"(?<!\\)\$|(?<!\\)\\[()\[\]]", " ", SPECIAL.sub("", text))  # but \$ and \\[2pt] stay
    text = " ".join(text.replace("...", "\\ldots").split()).lstrip(" *`\"“:").rstrip(" *_`\"”.,;:。✓✅")
    if text.count("}") > text.count("{"):  # \textbf{Answer: 7}
        text = text.removesuffix("}").rstrip(" .")
    text = re.sub(r"(?i)^the (?:correct )?(?:answer|option) is:? |[. ]*I hope it is correct$", "", text)
    return text.rstrip("\\ .").strip()

# Second half, in a worker: are two values equal? Rules, in this order, give each thing one spelling that
# math-verify reads: (pattern, replacement, "answer -> gold": accepted with the rule and not without it,
# "answer -> gold": a near miss, which must stay refused).
SYMBOLS = str.maketrans({x[0]: x[1:] + " " for x in (
    r"−- –- —- ×\cdot ·\cdot ⋅\cdot ÷/ ⁄/ ≡\equiv π\pi ∞\infty ∪\cup ≤\le ≥\ge ±\pm ∅\emptyset "
    r"∠\angle θ\theta ∈\in ≈\approx △\triangle").split()})
ARGUMENT = r" ?(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\w|\\pi|\\theta))"
AND = r"(?:,? ?\\text\{,? ?and,?\} ?|,? ?\band\b ?|, ?)"
AND_OR = r"(?:,? ?(?:\\text\{,? ?(?:and|or),?\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])|\\&))+"
MEASURES = {word: kind.split()[0] for kind in (  # compared where both values have one, converted nowhere
    "hour hr h", "minute min", "second sec s", "day", "week", "month", "year yr", "mm millimeter", "meter m",
    "cm centimeter", "km kilometer", "inch in inche", "foot ft feet", "yard yd", "mile mi mph", "gram g",
    "mg milligram", "kg kilogram", "pound lb", "ounce oz", "ml mL", "liter l", "cent", "dollar")
    for word in kind.split()}
MEASURE = "(" + "|".join(MEASURES) + r")s?(?![a-zA-Z])"

def point(match):
    """(3, 4) of "x = 3, y = 4", but x = 3, x = 4 as it is."""
    parts = sorted(part.replace(" =", "=") for part in re.split(AND, match[0]))
    names = {part[0] for part in parts}
    return f"({','.join(part[2:] for part in parts)})" if len(names) == len(parts) else match[0]

RULES = {
    "unicode": [
        ("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]", "", "1\u200b7 -> 17", "1\u200b7 -> 1"),
        ("[²³¹⁰-ⁿ]+", r"^{\g<0>}", "10³ -> 1000", "10³ -> 103"),  # before NFKC, which would make 103 of it
        ("[₀-ₜ]+", r"_{\g<0>}", "121₃ -> 121_3", "121₃ -> 121"),
        ("[¼-¾⅐-⅞]", r" \g<0>", "2½ -> 5/2", "2½ -> 21/2"),
        ("[^ -~º]+", lambda m: unicodedata.normalize("NFKC", m[0]).translate(SYMBOLS),
         "７×８ -> 56", "７×８ -> 78")],
    "markup": [
        (r"(?:\\q?quad(?![a-zA-Z])|~|(?<!\\)\\[,;: ]|\s)+", " ", r"\,\text{up} -> up", r"5\,6 -> 56"),
        (r"(?<=[{(\[]) | (?=[{})\]^])", "", r"7\text{ units } -> 7", r"7\text{ million } -> 7"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])", "", r"\big\{1\big\} -> 1", r"\left[0,1\right) -> 1"),
        (r"\\(?:displaystyle|boxed|bf|[lL]arge|(?:text)?color ?\{\w+\})(?![a-zA-Z])", "", r"\bf 9 -> 9",
         r"\bf 9 -> 8"),
        (r"\\?\$ ?(\d(?:[\d.,]|\\!|\{,\})*(?<!,)|\.\d+)(?!,?\d| ?[\w\\.{])|\\?[$€£¥₹¢]",
         lambda m: rf"{m[1]}\text{{dollars}}" if m[1] else " ", "€7.50 -> 7.5", r"\$7.50 -> 7.5 cents"),
        (r"^ ?(?:\\approx|\\sim|=) ", "", r"\approx 5.2 -> 5.2", r"\neq 5.2 -> 5.2"),
        (r"\\(?:math(?!bb)\w+|bm|boldsymbol)(?: ?\{ ?(\w) ?\}| (\w)\b)", r" \1\2",
         r"\mathbf a -> \mathbf{a}", r"\mathbf a -> \mathbf{b}"),
        (r"\\(?:text\w+|mbox|operatorname|math(?!bb)\w+|bm|boldsymbol|underline) ?(?=\{)", r"\\text",
         r"\mathrm{west} -> \text{west}", r"\mathrm{west} -> \text{east}"),
        (r"\\text(?=\{[^{}]*\\)", "", r"\mathbf{\frac{3}{4}} -> 3/4", r"\mathbf{\frac{3}{4}} -> 4/3"),
        (r"\\text\{([-+]?[\d(][^{}]*)\}", r"\1 ", r"\text{14/2} -> 7", r"\text{14 or 7} -> 7"),
        (r"^(?:\w ?= ?)?\\\{ ?\w(?: ?\\in ?\\mathbb ?\{?R\}?)? ?(?:[:|]|\\mid) ?(.+)\\\}$", r"\1",
         r"\{x : x \le 3\} -> x \le 3", r"\{x \mid x < 3\} -> x \le 3")],
    "functions": [
        (r"(\\text\{)?(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|pi|ln|log|exp)(?![a-zA-Z])(?(1)\})", r"\\\2 ",
         r"sin(x) -> \sin x", r"sin(x) -> \cos x"),
        *[(r"(?:√|(?<![\\a-zA-Z])sqrt|\\sqrt(?= ?\()) ?(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}",
           "sqrt(1+sqrt(9)) -> 2", "sqrt(1+sqrt(9)) -> 4")] * 2,
        (r"\\[dtc]?frac" + ARGUMENT * 2, r"\\frac{\1\2}{\3\4}", r"\tfrac12 -> \frac{1}{2}", r"\frac12 -> 12"),
        (r"\\(sqrt|log_)" + ARGUMENT, r"\\\1{\2\3}", r"2\sqrt3 -> \sqrt{12}", r"\sqrt32 -> \sqrt{32}"),
        (r"\*\*(?=[\w({\\-])", "^", "2**3 -> 8", "2**3 -> 6"),
        (r"\^ ?(?:\(([^()]*)\)|(\\frac\{[^{}]*\}\{[^{}]*\}|-\d+))", r"^{\1\2}", "2^(3) -> 8", "2^(3) -> 6"),
        (r"\(?\\?(?<![a-z])[pb]?mod ?\{?(\w+)\}?\)?", r"\\pmod{\1}", r"4 mod 9 -> 4 \pmod9",
         "4 mod 9 -> 4 mod 8"),
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
        (r"(?<![\d.,])\d{1,3}(?:(?:[ ']\d{3})+|(?:\.\d{3}){2,}|(?:,\d{3})+(?= ?\\?%))(?![\d.])",
         lambda m: re.sub(r"\D", "", m[0]), "1'234'567 -> 1234567", "1'23 -> 123"),
        (r"(?<=[\d)}.]) ?((?:\\text)?\{)?(?:\\?%|per ?cent\b)(?(1)\})(?: (?=[a-z\\]))?", r"\\%",
         "25 percent -> 1/4", "25 percent gain -> 1/4"),
        (r"\.(\d*)\\(?:overline|bar|dot) ?\{(\d+)\}", lambda m: f".{m[1]}{m[2] * 30}", r"0.\bar{6} -> 2/3",
         r"0.\bar{6} -> 0.6")],
    "units": [  # more in UNITS
        (r"\\frac\{\\text\{(\w+)\}\}\{\\text\{(\w+)\}\}", r"\\text{\1/\2}",
         r"60 \frac{\text{miles}}{\text{hour}} -> 60", r"60 \frac{\text{miles}}{\text{hour}} -> 60 km/h"),
        (r"\^\{?\\circ\}?|\\degree|º", "°", r"30\degree -> 30", r"30\degree -> 3"),
        (r"(\\(?:sin|cos|tan|cot|sec|csc)[ ({]*)([\d.]+)°", r"\1\\frac{\2\\pi}{180}", r"\sin 30° -> 1/2",
         r"\sin 30 -> 1/2"),
        (r"°(?: ?(?:\\text\{[CF]\}|[CF](?![a-zA-Z])))?", " ", "20° C -> 20", "20 C -> 20"),
        (r"(?<=\d) ?(?:\\text\{)?" + MEASURE + r"[., }and]*(?=[\d.]+ ?(?:\\text\{)?(?!\1)" + MEASURE + ")",
         lambda m: rf"\text{{{MEASURES[m[1]]}}}", "2 hours and 30 minutes -> 2 hr 30 min",
         "2 hours and 30 minutes -> 30 hr 2 min"),
        (r"(\\text\{\w+\}[\d.]+) ?" + MEASURE + "$", lambda m: rf"{m[1]}\text{{{MEASURES[m[2]]}}}",
         "5 min 20 s -> 5 minutes 20 seconds", "5 min 20 s -> 5 hr 20 s"),
        (r"(?i)\b([ap])\.(?=m)", r"\1", r"7:20 p.m -> 7:20 \text{ PM}", r"7:20 a.m -> 7:20 \text{ PM}")],
    "lists": [
        (r"^.*(?:[<>]|\\[lg]eq?|\\neq?)(?![a-z]).*", lambda m: re.sub(  # between inequalities the word counts
            AND_OR, lambda word: r"\lor " if "or" in word[0] else r"\land ", m[0]), "x>1 and x>3 -> x>3",
         "x>1 or x>3 -> x>3"),
        (rf"^[x-z] ?=[^=,]*?(?:{AND}[x-z] ?=[^=,]*?){{1,2}}$", point, "y = 4 and x = 3 -> (3,4)",
         "x = 3, x = 4 -> (3,4)"),
        (AND_OR, ",", r"2 \text{ or } 5 -> 2, 5", r"2 \text{ or } 5 -> 25"),
        (r"^([^,]*)\\pm([^,]*)$", r"\1+\2,\1-\2", r"\frac{3 \pm i}{2} -> \frac{3}{2} \pm \frac{i}{2}",
         r"3 \pm i -> 3 + i")]}

# What may go behind a number. Not math-verify's list: it has single letters (2m would be 2), am and east.
# Written for re.VERBOSE, with an example and a near miss as above.
UNITS = [
    ("|".join(word for word in MEASURES if len(word) > 1 and word != "hr"), "35 cm -> 35", "35 cm -> 35 m"),
    ("squared? | cubed | cubic | sq | cu", "5 square units -> 5", "5 square cm -> 5 cm"),
    ("people|person|children|[wo]*men|way", "7 men -> 7", "7 men -> 8"),
    (r"per\ [a-z]+", "60 miles per hour -> 60", "60 per cent -> 6"),
    (r"[Jm](?=\ ?/)|(?<=/)[smhK]", "7 m/s -> 7", "7m -> 7"),
    (r"hr(?!\^)", "4 hrs -> 4", "4 hr^n -> 4"),
    (r"(?<=\{)[A-Zmgshl](?=[}/\ ^])", r"4\text{ h} -> 4", "4 h -> 4"),
    ("nm|[kM]J|k?cal|k?mol|[kMG]?(?:eV|Hz|Pa)|deg|degree|rad|unit|cup|USD", "6.5 kJ -> 6.5", "6.5 k -> 6.5"),
    (r"(?!(?:ten|\w+red|thousand|\w+illion|dozen|third|\w+th|halve|quarter|\w+crease|\w+verge|plu|minu|"
     r"\w+s)s)[a-z]{3,}s", "14 stamps -> 14", "14 minus -> 14")]
UNIT = re.compile(r"""(?x)
    (?: (?<!%) | (?= (?:\\text\{)?per\  ) )    # a percent sign keeps its "gains" and "losses", not "per year"
    (?: (?: (?<=[\d)}\]!%])\ ? | (?<=\\pi)\  ) # a unit without \text stands behind a number or \pi,
        (?= [a-zA-Z]{2} | [Jm]\ ?/ )           # and has two letters, or is that of 5 J/g or 7 m/s
      | (?<=.) \ ?/?\ ? (\\text\{) )           # a unit in \text stands behind anything
    (?: (?:""" + "|".join(pattern for pattern, *_ in UNITS) + r""") s? (?![a-zA-Z])
        (?: [./\ ] | \^\{?-?[1-3]\}? )* )+     # several units, each with its power: kg m/s^2
    (?(1) \} (?: \^\{?[23]\}? )? )             # \text{cm}^2
    (?! \ ?\d )                                # 5 gallons 2 quarts is not 52
    """)
DIMENSION = re.compile(r"(?<![a-zA-Z])(?:(sq|cu)\w*[. ]+)?" + MEASURE + r"(?:\}?\^\{?-?(\d)| (sq|cu)\w*ed)?")
# Misread by math-verify, so compared as text only, with what it would take for equal
MISREAD = [
    (r"(?<![a-zA-Z\d_{])\d[\dA-F]*_", "52_9 -> 52_8"), (r"(?<![\d_^])\d+ \d", "5 6 -> 11"), ("'", "f' -> f"),
    (r"\\text", r"5\text{ R }2 -> 2\text{ R }5"), (r"\\angle", r"\angle AB -> \angle BA"),
    ("dots", r"2,4,6,\ldots -> 2,4,6"), (r"[A-Z]{3}|(?<![\\{a-zA-Z])[a-z]{4}", "seat -> east")]
UNREAD = re.compile("|".join(pattern for pattern, _ in MISREAD))
PERCENT = re.compile(r"((?:\d+/)?[\d.]+|(?:\d+ ?)?\\frac\{\d+\}\{\d+\})\\%")
TEXT = re.compile(r"\\text\{([^{}]*)\}")
OPTION = re.compile(r"\(?[A-J]\)?")
CHOICE = re.compile(r"""(?x)
    \ ? (?: (?i:option|choice)\  )? [(\[{]? ([A-J])  # the letter
    (?: [.)]\ ?[A-Z][a-z] .*                         # B. A sentence follows, which may name other options
      | (?: [).,:;?!*\]}](?!\w)                      # B) or B: seven
          | (?= \ [^=+*/^_<>] )                      # B because ..., but not B + 1
          | $ )
        (?: (?! (?<![\w'\\]) (?: [B-HJ]             # and no other letter in what follows,
                | [AI](?!\ [a-z]) ) (?![\w']) ) . )* ) # where A or I may be a word
    """)
PAIR = re.compile(r"[(\[][^()\[\]]*[)\]]")
NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|(?=\.?\d)\d*(?:\.\d*)?)")
WORD = re.compile(r"(?<![\\a-zA-Z])(?:(?=\w*[aeiouyAEIOU])(?:[A-Z][a-z]{2,}|[A-Z]{3,})|N[oO]|[AP]M)"
                  r"(?![a-zA-Z_])")

def normalise(text):
    """One spelling for each thing, still LaTeX that math-verify reads."""
    for rules in RULES.values():
        for pattern, replacement, *_ in rules:
            text = re.sub(pattern, replacement, text)
    return " ".join(text.split())

def canonical(text):
    """The canonical form of a normalised value: equal forms, equal answers. "3 5" keeps its space: not 35."""
    text = WORD.sub(lambda m: m[0].lower(), TEXT.sub(r"\1", text))  # Marcus, DNE; but not in AB, CO, Mgh
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    return re.sub(r"\{(\w)\}", r"\1", text).rstrip(".")  # \frac{1}{2} and \frac12, 5_{4} and 5_4

def dimensions(text):
    """What a normalised value is measured in: [("meter", "1"), ("second", "2")] of 7 m/s^2."""
    units = DIMENSION.finditer("".join(unit[0] for unit in UNIT.finditer(text)))
    powers = {None: "1", "sq": "2", "cu": "3"}
    return [("%", "1")] * (r"\%" in text) + [(MEASURES[m[2]], m[3] or powers[m[1] or m[4]]) for m in units]

def equal(answer, gold):
    """Are two normalised values equal?"""
    if OPTION.fullmatch(canonical(gold)):  # multiple choice
        return CHOICE.sub(r"\1", TEXT.sub(r" \1 ", answer).strip()) == canonical(gold).strip("()")
    if canonical(answer) == canonical(gold):
        return True
    if any(a != g for a, g in zip(dimensions(answer), dimensions(gold))):
        return False  # cm and m, cm^2 and cm^3
    bare = [UNIT.sub("", text).strip() for text in (answer, gold)]
    readings = [r"\\frac{\1}{100}"]
    if (r"\%" in answer) != (r"\%" in gold):  # on one side only the sign may go, as a unit may
        readings.append(r"\1 ")
    return any(equal_bare(*[PERCENT.sub(percent, text) for text in bare]) for percent in readings)

def equal_bare(answer, gold):
    """Exact rules first, then math-verify's opinion."""
    a, g = canonical(answer), canonical(gold)
    if ("=" in a) != ("=" in g):  # n = 52_8 and 52_8
        a, g = (re.sub(r"^[a-zA-Z]=", "", x) for x in (a, g))
    if a == g:
        return True
    if NUMBER.fullmatch(a) and NUMBER.fullmatch(g):  # 055, 11,111, .5
        return fractions.Fraction(a.replace(",", "")) == fractions.Fraction(g.replace(",", ""))
    if (any(UNREAD.search(x.rpartition("=")[2]) for x in (answer, gold))
            or PAIR.fullmatch(a) and PAIR.fullmatch(g) and a[0] != g[0]):  # [3, 1] and (3, 1) would be points
        return False
    return sympy_equal(to_sympy(answer), to_sympy(gold))

def latex_to_sympy(text):
    """Sympy's expression of a text. x<1 \\lor x>3 is joined; a comma beside the word means the same."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    for word, join in ((r"\lor", sympy.Or), (r"\land", sympy.And)):
        if word in text:
            return join(*map(latex_to_sympy, text.replace(",", word).split(word)))
    return latex2sympy(text, is_real=True, conversion_config=ConversionConfig(lowercase_symbols=False))

@functools.lru_cache(1000)
def to_sympy(text):
    """A value as sympy has it: letters keep their case; conditions on x become x = the set they allow."""
    import sympy
    value = latex_to_sympy(text)
    inequalities = (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Ne)
    if not isinstance(value, (sympy.FiniteSet, sympy.And, sympy.Or)) or not value.atoms(*inequalities):
        return sympy.expand_log(value, force=True) if isinstance(value, sympy.Expr) else value
    if len(value.free_symbols) > 1:
        return sympy.FiniteSet(*value.args) if type(value) is sympy.And else value
    conditions = value.args if isinstance(value, sympy.FiniteSet) else [value]
    allowed, all_x = sympy.Or(*conditions).as_set(), (sympy.Reals, sympy.UniversalSet)
    if allowed in all_x:  # x>1, x<3; but x<1, x>3
        allowed = sympy.And(*conditions).as_set()
    if allowed in (sympy.S.EmptySet, *all_x):
        raise ValueError("of nothing and of everything one spelling is as good as another")
    return sympy.Eq(*value.free_symbols, allowed, evaluate=False)

def sympy_equal(a, g):
    """Numbers by their digits, all else by math-verify's opinion, less its false equalities."""
    import sympy
    from math_verify import verify
    if all(getattr(x, "is_number", False) and x.is_finite for x in (a, g)):
        # Not by math-verify: to its 6 decimals .0000672 = .0000674, and to its 15 digits 1/2^99 = 1/2^98.
        x, y, rough = a.evalf(60), g.evalf(60), "." in f"{a}{g}"
        return bool(abs(x - y) <= (1e-6 if rough else 1e-50) * max(abs(x), abs(y)))
    # The set option: -2 <= x <= 7 is the interval [-2, 7].
    if not verify(g, a, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    kinds = {type(x.rhs if isinstance(x, sympy.Eq) else x).__name__ for x in (a, g)}
    if "FiniteSet" not in kinds:
        return True
    # 1, 2, 2 is not 1, 1, 2; and no set is (1, 2), be it a pair or an interval
    items = [sorted(map(str, x._unsorted_args)) for x in (a, g) if hasattr(x, "_unsorted_args")]
    often = [[part.count(x) for x in part] for part in items]
    return often[:1] == often[-1:] and not kinds & {"Tuple", "Interval"}

# math-verify runs in processes that can be killed: its alarm works in the main thread only and stops no C
# code (9^9^9^9). They start by exec, not by fork of a trainer with CUDA and NCCL, and are kept: it is slow.
# A comparison, which takes 0.01 to 0.6 s, may take 15 times the CPU time of the worker's own start, 0.4 s: in
# seconds the limit would make verdicts depend on the processor.
PATIENCE = 15
WALL_SECONDS = 1000  # room to start on a busy machine; later no answer takes as long: its CPU time is bounded
MEMORY = 4 << 30  # bytes of address space of a worker: a huge power must not take the trainer's memory
IDLE = []         # started workers, waiting

def ask_worker(pair):
    """Are (answer, gold) equal? What takes too long or ends the worker is wrong."""
    worker, reply = IDLE.pop() if IDLE else None, ""
    if worker is None or worker.poll() is not None:
        worker = subprocess.Popen([sys.executable, os.path.abspath(__file__), "worker"], text=True, stdin=-1,
                                  stdout=-1, start_new_session=True,  # -1: a pipe. Ctrl-C is not for workers
                                  env=os.environ | {"PYTHONHASHSEED": "0"})  # sympy's order, and so verdicts
    with contextlib.suppress(OSError):  # killed from outside just now; no reason to end a training run
        print(json.dumps(pair), file=worker.stdin, flush=True)
        reply = worker.stdout.readline() if select.select([worker.stdout], [], [], WALL_SECONDS)[0] else None
    if reply:
        IDLE.append(worker)
        return json.loads(reply)
    worker.kill()
    if worker.wait() > 0 or reply is None:  # not killed, or stands still: no fault of the answer
        raise RuntimeError("a grading worker did not start (see above); is math-verify installed?")
    return False

def worker_main():
    import logging
    import resource
    import signal
    import math_verify  # noqa: F401  slow: no pair pays for it
    from latex2sympy2_extended import latex2sympy2  # noqa: F401
    limit = PATIENCE * time.process_time()
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # a stray print must not look like a reply
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:  # ends when the parent does
        # CPU time: a verdict must not depend on the load. The kernel kills, in C code and orphans too.
        signal.setitimer(signal.ITIMER_PROF, limit)
        right = False
        with contextlib.suppress(Exception):  # what sympy cannot read is not the answer
            right = bool(equal(*map(normalise, json.loads(line))))
        print(json.dumps(right), file=replies, flush=True)

def grade_all(responses, golds, finished=None, workers=2):
    """Verdicts of many responses. Each distinct pair (answer, gold) is compared once."""
    found = []
    for response, gold, done in zip(responses, golds, finished or [True] * len(responses), strict=True):
        tail = response[max((tag.end() for tag in CLOSING.finditer(response)), default=0):]
        cut = not done or bool(OPENING.search(tail))
        gold = last_box(str(gold))[1] or clean(str(gold))  # of a whole reference solution: its last box
        whole = find_answers(response)
        by_rule = (None,) * 3 if cut else whole if tail == response else find_answers(tail)
        found.append((gold, cut, *by_rule, *whole[1:]))
    told = {(x, gold): x == gold for gold, _, *answers in found for x in answers}
    asked = sorted(pair for pair in told if pair[0] and not told[pair] and max(map(len, pair)) <= LONGEST)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        told.update(zip(asked, pool.map(ask_worker, asked)))
    verdicts = []
    for gold, cut, answer, *others in found:
        right, line, box, full_line, full_box = (told[x, gold] for x in (answer, *others))
        verdicts.append(Verdict(right, answer, line, box, full_line or full_box, cut,
                                answer is None and not cut))
    return verdicts

def grade(response, gold, finished=True):
    """Verdict of one response. `gold`: the answer, or a reference solution whose last \\boxed{} holds it."""
    return grade_all([response], [gold], [finished])[0]

# ------------------------------------------------------------------------------------------------- BENCHMARKS
BENCHMARKS = {  # name: hub id, configuration, split
    "math500": "HuggingFaceH4/MATH-500::test",
    "aime24": "HuggingFaceH4/aime_2024::train",
    "aime25": "math-ai/aime25::test",
    "gpqa_diamond": "Idavidrein/gpqa:gpqa_diamond:train",
    "mmlu": "cais/mmlu:all:test"}

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}  # the paper's

def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

def load_problems(source, wrapper="math"):
    """Problems (id, problem, tools, answer, level or None) of a benchmark, a copy of it (math500=DIR), or
    what opsdc.py's --data is. Those without a known answer are left out; opsdc.py says how many there are."""
    import opsdc
    name, _, copy = source.partition("=")
    blamed = contextlib.nullcontext()  # opsdc.py names a file itself
    if name in BENCHMARKS:
        hub_id, _, rest = BENCHMARKS[name].partition(":")
        source = f"{copy or hub_id}:{rest}"
        blamed = blaming(f"benchmark {name} (if gated, accept its terms on its hub page; offline a "
                                 f"copy: {name}=DIR)")
    with blamed:
        check(re.search("[./]", source) or Path(source.partition(":")[0]).exists(),
              f"{source}: expected {', '.join(BENCHMARKS)}, a file, a folder or a hub ID")
        problems = [p for p in read_problems(source, *opsdc.WRAPPERS[wrapper]) if p["answer"] is not None]
        check(problems, f"{source}: expected a field answer, final_answer or solution, found none")
        for p in problems:
            ids = p.pop("ids")
            with blaming(f"{source}, row {p['number']}, unique_id, id or level"):
                p["level"] = ids["level"] if isinstance(ids["level"], int) else as_text(ids["level"]) or None
                p["id"] = as_text(ids["unique_id"]) or as_text(ids["id"]) or str(p["number"] - 1)
    often = collections.Counter(p["id"] for p in problems)
    for p in problems:
        p["id"] += f", row {p.pop('number')}" * (often[p["id"]] > 1)
    return problems

# ------------------------------------------------------------------------------------------------- GENERATION
def make_jobs(tokenizer, problems, samples, seed, instruction=None, thinking=True, wrapper="math"):
    """`samples` jobs of each problem: records without a response, with the prompt's ids. instruction: c's."""
    import opsdc
    jobs = []
    for p in problems:
        prompt = opsdc.prompt_ids(tokenizer, p["problem"], instruction, thinking, wrapper, p.get("tools"))
        job = {name: p[name] for name in ("id", "problem", "level")} | {
            "gold": p["answer"], "prompt": prompt, "prompt_hash": digest(prompt),
            "problem_hash": digest(p["problem"], p["answer"])}
        jobs += [job | {"sample": i, "seed": int(digest(seed, p["id"], i), 16)} for i in range(samples)]
    return jobs

def make_records(tokenizer, jobs, outputs):  # one of each job, graded; outputs: (ids, logprobs, finished)
    # The last id of a finished response ended it: no text, even where the tokenizer does not call it special.
    texts = [readable(tokenizer, job["prompt"], ids[:-1] if done else ids)
             for job, (ids, _, done) in zip(jobs, outputs, strict=True)]
    verdicts = grade_all(texts, [job["gold"] for job in jobs], [done for *_, done in outputs])
    thinks = [think_length(tokenizer, ids, text) for (ids, *_), text in zip(outputs, texts)]
    return [{name: value for name, value in job.items() if name != "prompt"} | {
        "tokens": len(ids), "think_tokens": think, "answer_tokens": len(ids) - think, "response": text,
        "finish_reason": "stop" if done else "length", **verdict._asdict()}
        for job, (ids, _, done), text, think, verdict in zip(jobs, outputs, texts, thinks, verdicts)]

def grade_rollouts(rollouts, problems, tokenizer):
    known = [r for r in rollouts if problems[r.index].answer is not None]
    jobs = [{"prompt": problems[r.index].student, "gold": problems[r.index].answer} for r in known]
    for r, record in zip(known, make_records(tokenizer, jobs, [(r.ids, None, r.finished) for r in known])):
        r.correct = record["correct"]

def readable(tokenizer, prompt, ids):
    """The text that is graded: think tags kept (special tokens for some), other special tokens not."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    for token in tokenizer.all_special_tokens:
        text = text if OPENING.fullmatch(token) or CLOSING.fullmatch(token) else text.replace(token, "")
    tags = list(OPENING.finditer(tokenizer.decode(prompt[-16:]).rstrip()))  # by the template: R1-Distill's
    return f"{tags[-1][0]}\n{text}" if tags and not tags[-1].string[tags[-1].end():] else text

def think_length(tokenizer, ids, text):
    """Tokens up to the last closing think tag and with it; all of them if none came, 0 without a block."""
    closed = list(CLOSING.finditer(text))
    if not closed:
        return len(ids) if OPENING.search(text) else 0
    close = tokenizer.convert_tokens_to_ids(closed[-1][0])
    if close in ids:
        return len(ids) - ids[::-1].index(close)
    # spelled with several tokens: encoded again, about one token off
    return len(tokenizer.encode(text[:closed[-1].end()], add_special_tokens=False))

# ------------------------------------------------------------------------------------------------- STATISTICS
def grouped(records, column):  # {value: its records} in the order of values; those without one are left out
    found = collections.defaultdict(list)
    for record in sorted(records, key=lambda r: str(r[column])):
        found[record[column]].append(record)
    return {value: group for value, group in found.items() if value is not None}

def mean(records, column):
    return statistics.fmean(r[column] for r in records)

def clustered_error(groups, column):  # of the mean over problems, whose samples depend on each other, or None
    means = [mean(group, column) for group in groups]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None

def summarise(records):
    """Statistics of records with equally many samples of each problem. Shares are fractions."""
    groups = [*grouped(records, "id").values()]
    sizes = sorted({len(group) for group in groups})
    check(len(sizes) == 1, "expected equally many samples of each problem, found "
          f"{len(records)} records with {' or '.join(map(str, sizes)) or 'no'} samples")
    right = [r["tokens"] for r in records if r["correct"]]
    return {
        "problems": len(groups), "samples": len(groups[0]),
        "accuracy": mean(records, "correct"), "accuracy_se": clustered_error(groups, "correct"),
        **{column: mean(records, column) for column in (
            "answer_only", "boxed_only", "either_full_text", "truncated", "no_answer", "think_tokens",
            "answer_tokens", "tokens")},
        "tokens_se": clustered_error(groups, "tokens"),
        "tokens_median": statistics.median(r["tokens"] for r in records),
        "tokens_correct": statistics.fmean(right) if right else None,
        "levels": {str(level): summarise([r | {"level": None} for r in group])
                   for level, group in grouped(records, "level").items()}}

def paired(base, ours, draws=4000):
    """Token reduction (1 - ratio of means), accuracy change: (value, low, high), 95 % bootstrap intervals.
    Problems are drawn, each with all its samples in both runs: what is long in one is long in the other."""
    import numpy
    base, ours = grouped(base, "id"), grouped(ours, "id")
    check(base and base.keys() == ours.keys(), "expected two runs on the same problems")
    means = numpy.array([[mean(run[problem], column) for problem in base]
                         for column in ("tokens", "correct") for run in (base, ours)])  # [4, problems]
    check(means[0].any(), "the first run has no tokens at all: there is nothing to reduce")
    rng, count = numpy.random.default_rng(0), len(base)
    drawn = [means[:, rng.integers(count, size=count)].mean(1) for _ in range(draws)]
    was, tokens, right, our_right = numpy.array([means.mean(1), *drawn]).T  # the first is of all problems
    return {name: (float(found[0]), *numpy.percentile(found[1:], [2.5, 97.5]).tolist())
            for name, found in (("reduction", 1 - tokens / was), ("change", our_right - right))}

# --------------------------------------------------------------------------------------------- COMPARING RUNS
MAY_DIFFER = ("model", "model_hash", "instruction", "template", "seed")  # in two comparable runs

def read_lines(path):  # of a .jsonl file; a last line without its end, which a kill left, is dropped
    rows = []
    for at, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {at}: not JSON ({error}); restore or move the file") from None
    return rows

def read_summary(directory):
    try:
        summary = json.loads(Path(directory, "summary.json").read_text())
        version = summary["settings"]["version"]
        check(version == VERSION, f"version {version} of eval.py, this is {VERSION}; evaluate again")
        return summary
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: expected the --out directory of an evaluation, with its summary.json;"
                         f" found {type(error).__name__}: {error}") from None

def read_run(directory):  # (settings, {benchmark: records}) of a finished evaluation
    summary = read_summary(directory)
    check(summary["finished"], f"{directory}: not finished; repeat its command, it goes on where it stopped")
    return summary["settings"], {
        name: read_lines(Path(directory, f"{name}.jsonl")) for name in summary["benchmarks"]}

def refuse_unless_comparable(base, ours, names):
    a, b = ({**run[0], "benchmarks": sorted(run[1])} for run in (base, ours))
    differ = [f"{k} is {v!r} and {b.get(k)!r}" for k, v in a.items() if k not in MAY_DIFFER and v != b.get(k)]
    for name in base[1].keys() & ours[1].keys():
        a, b = ({(r["id"], r["problem_hash"]) for r in run[1][name]} for run in (base, ours))
        if a != b:
            differ.append(f"{name} has {len(a - b)} and {len(b - a)} problems of its own: {min(a ^ b)[0]}")
    check(not differ, f"{names[0]} and {names[1]} cannot be compared: " + "; ".join(differ))

def markdown(header, rows):
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)

def percent(value, *interval, sign=""):
    text = "" if value is None else f"{100 * value:{sign}.1f}"
    return text + (f" [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]" if interval else "")

def contrast(base, ours):  # [(level or "all", statistics of base, of ours, paired differences)], "all" first
    by_level = grouped(ours, "level")
    parts = [("all", base, ours)] + [(x, a, by_level.get(x, [])) for x, a in grouped(base, "level").items()]
    return [(level, summarise(a), summarise(b), paired(a, b)) for level, a, b in parts]

def compare(args):
    check(len(args.directories) > 1, "compare needs the directories of at least two evaluations")
    base_dir, *directories = args.directories
    base_run, *runs = map(read_run, args.directories)
    for directory, run in zip(directories, runs):
        refuse_unless_comparable(base_run, run, (base_dir, directory))
    contrasts = {}
    for name, base in base_run[1].items():
        rows = []
        for label, (_, ours) in zip(directories, runs):
            contrasts[name, label] = contrast(base, ours[name])
            rows += [[label, level, a["problems"], f"{percent(a['accuracy'])} -> {percent(b['accuracy'])}",
                      percent(*versus["change"], sign="+"), f"{a['tokens']:.0f} -> {b['tokens']:.0f}",
                      percent(*versus["reduction"])] for level, a, b, versus in contrasts[name, label]]
        header = [name, "level", "problems", "accuracy, %", "change, points", "mean tokens", "reduction, %"]
        print(markdown(header, rows), end="\n\n")
    print(f"Base: {base_dir}. In brackets: 95 % paired bootstrap intervals over problems.")
    if args.plot:
        plot_compare(args.plot, args.directories, contrasts)
        print(f"wrote {args.plot}")

# --------------------------------------------------------------------------------------------------- PICTURES
def pyplot():
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")  # a file, no screen
    return pyplot

def plot_compare(path, directories, contrasts):
    """A line from the base through the runs in their order, each with its name; thin ones by level."""
    figure, ax = pyplot().subplots(figsize=(9, 6), layout="constrained")
    names = [Path(directory).name for directory in directories]
    labels = names if len({*names}) == len(names) else directories
    for i, benchmark in enumerate(dict.fromkeys(name for name, _ in contrasts)):
        for parts in zip(*(contrasts[benchmark, directory] for directory in directories[1:])):
            level, base, *_ = parts[0]
            runs, whole = [base, *(ours for _, _, ours, _ in parts)], level == "all"
            x, dx, y, dy = ([scale * (run[column] or 0) for run in runs] for column, scale in (
                ("tokens", 1), ("tokens_se", 1.96), ("accuracy", 100), ("accuracy_se", 196)))
            ax.errorbar(x, y, dy, dx, color=f"C{i}", marker="o", capsize=3, elinewidth=0.8,
                        linewidth=3 if whole else 0.8, label=benchmark if whole else None)
            for *place, text in zip(x, y, labels) if whole else [(x[-1], y[-1], level)]:
                ax.annotate(f"  {text}", place, rotation=30, rotation_mode="anchor")
    ax.set(xlabel="mean response tokens", ylabel="accuracy, %",
           title="from the base on, in the order given; thin: by level; bars: 95 %")
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=150)

PANELS = "response_tokens", "loss", "student_entropy", "accuracy", "grad_norm", "truncated"

def curves(args):  # metrics of training runs over steps; a dotted line where thetabar was refreshed
    figure, axes = pyplot().subplots(2, 3, figsize=(14, 7), layout="constrained")
    for i, directory in enumerate(args.directories):
        rows = read_lines(Path(directory, "metrics.jsonl"))
        for ax, metric in zip(axes.flat, PANELS):
            known = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            ax.plot(*zip(*known), color=f"C{i}", label=directory if metric == PANELS[0] else None)
            for row, following in zip(rows, rows[1:]):
                if following["teacher_age"] < row["teacher_age"]:
                    ax.axvline(row["step"] + 0.5, color=f"C{i}", linewidth=0.8, linestyle=":")
            ax.set(title=metric, xlabel="step")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(args.plot, dpi=90)
    print(f"wrote {args.plot}; dotted lines: thetabar <- theta")

# ----------------------------------------------------------------------------------------------------- TOKENS
# What the loss sees: the divergence of every token of a response, computed by the trainer's own functions.
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta name=color-scheme content="light dark"><title>What the loss sees</title><style>
body { max-width: 60rem; margin: auto; padding: 1rem 1rem 4rem; font: 15px/1.5 system-ui, sans-serif }
h2 { font-size: 1rem; margin: 1.5rem 0 .3rem }
h2, pre, td, #bar { white-space: pre-wrap; overflow-wrap: anywhere }
pre, td, #bar { font: 13px/1.6 ui-monospace, monospace }
pre { border: 1px solid #8886; border-radius: 6px; padding: .5rem .7rem }
td, th { text-align: left; padding-right: 2rem; border-bottom: 1px solid #8886 }
span { background: rgb(240 100 0 / calc(80% * var(--shade))) }
span:hover, #bar { outline: 2px solid }
#bar { position: fixed; inset: auto 0 0; padding: .5rem 1rem; background: Canvas }
</style><script>
onmouseover = ({target: {dataset: {d, p, q, best}}}) => document.getElementById("bar").textContent =
  d ? `${d} nats   student p ${p}   teacher q ${q}   its likeliest: ${best}` : ""
</script><div id=bar>Point at a token.</div><h1>What the loss sees</h1><p>Shaded: where student and teacher
differ, by <span style=--shade:.1>0.02</span> <span style=--shade:.5>0.5</span> <span style=--shade:1>2
nats</span>.
"""

def token_options(argv):  # opsdc.py's and three more
    import opsdc
    parser = opsdc.HfArgumentParser(opsdc.Config)
    parser.error = refuse_words
    parser.add_argument("--samples", type=int, default=4, help="number of responses")
    parser.add_argument("--given", action="store_true", help="show the responses in --data, which is a run's "
                        "samples.jsonl or an evaluation's records")
    parser.add_argument("--teacher", help="hub id or folder of the teacher's weights; default: --model")
    parser.set_defaults(out="tokens.html")
    return parser.parse_args(argv)

def read_responses(cfg, problems, tokenizer):
    """Rollouts of the first --samples rows of --data: the ids sampled, of records those of the text."""
    import opsdc
    places, rollouts = {digest(p.text): i for i, p in enumerate(problems)}, []
    for _, (where, row) in zip(range(cfg.samples), read_rows(cfg.data)):
        with blaming(f"{where}: expected a line of samples.jsonl or a record of eval.py, found no"):
            place = places.get(digest(read_problem(row, where, *opsdc.WRAPPERS[cfg.wrapper])[1]))
            check(place is not None and "response" in row, "response to a problem of them")
            text, finished = row["response"], row.get("finished", row.get("finish_reason") == "stop")
        if "finish_reason" in row:  # a record: undo `readable`
            text = text.removeprefix(readable(tokenizer, problems[place].student, []))
            text += tokenizer.eos_token * finished
        ids = row.get("ids") or tokenizer.encode(text, add_special_tokens=False)
        rollouts.append(opsdc.Rollout(place, ids, [0.0] * len(ids), finished, row.get("correct")))
    return rollouts

def score(student, teacher, batch, tokenizer, cfg):
    """Of each token, --loss_chunk at a time: itself, divergence, p, q, the three likeliest of the teacher."""
    import opsdc
    hidden, heads, found = [], [], []
    for model, inputs in ((student, batch.student), (teacher, batch.teacher)):
        hidden.append(model(*inputs).split(cfg.loss_chunk))  # [n, d] each
        model.reshard()
        heads.append(model.lm.get_output_embeddings().weight.to(opsdc.DTYPE).full_tensor().float().T)
    quoted = lambda ids: [json.dumps(tokenizer.decode([y]), ensure_ascii=False) for y in ids]
    for y, *parts in zip(batch.tokens.split(cfg.loss_chunk), *hidden):
        log_p, log_q = (opsdc.finish_logits(h.float() @ head, **student.logit_options)[0].log_softmax(-1)
                        for h, head in zip(parts, heads))
        p, q = log_p.exp(), log_q.exp()
        nats, _ = opsdc.divergence_and_gradient(p, log_p, q, log_q, cfg.divergence)
        best = [list(zip(quoted(ids), row)) for row, ids in zip(*(x.tolist() for x in q.topk(3)))]
        chances = (x.gather(-1, y[:, None])[:, 0].tolist() for x in (p, q))
        found += zip(quoted(y), nats.tolist(), *chances, best)
    return found

def pieces(tokenizer, ids):  # each token's text: "" in a character of several, whose last one brings it
    found, before, since = [], 0, 0
    for at in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:at])[len(tokenizer.decode(ids[before:since])):]
        whole = at == len(ids) or not text.endswith("\ufffd")
        found.append(text if whole else "")
        before, since = (since, at) if whole else (before, since)
    return found

def page(tokenizer, problems, rollouts, scores, about):  # responses, and what carries most of the loss
    import opsdc
    escape = lambda text: html.escape(str(text), quote=False).replace("'", "&#39;").replace("\r", "&#13;")
    found, nats_of = [PAGE, f"<p>{escape(about)}\n"], collections.defaultdict(list)
    wanted = collections.defaultdict(collections.Counter)  # token: its part of the loss, by the likeliest
    for rollout, weights, tokens in zip(rollouts, opsdc.token_weights(rollouts), scores):
        verdict = {None: "not graded", True: "right", False: "wrong"}[rollout.correct]
        found.append(f"<h2>{escape(problems[rollout.index].text)}</h2>{len(tokens)} tokens, "
                     f"{statistics.fmean(nats for _, nats, *_ in tokens):.4g} nats/token, {verdict}\n<pre>")
        for text, weight, (token, nats, p, q, best) in zip(pieces(tokenizer, rollout.ids), weights, tokens):
            nats_of[token].append(nats)
            wanted[token][best[0][0]] += weight * nats
            best = ", ".join(f"{token} {chance:.3g}" for token, chance in best)
            found.append(f"<span style=--shade:{min(1, math.sqrt(nats / 2)):.2f} data-d={nats:.6g} "
                         f"data-p={p:.3g} data-q={q:.3g} data-best='{escape(best)}'>{escape(text)}</span>")
        found.append("</pre>\n")
    loss = sum(those.total() for those in wanted.values())
    found.append(f"<h2>What carries most of the loss, {loss:.6g} nats/token</h2><table><tr><th>token<th>times"
                 "<th>mean nats<th>% of the loss<th>the teacher's likeliest there\n")
    for token, those in sorted(wanted.items(), key=lambda item: -item[1].total())[:20]:
        row = (token, len(nats_of[token]), f"{statistics.fmean(nats_of[token]):.3g}",
               percent(those.total() / (loss or 1)), " ".join(best for best, _ in those.most_common(3)))
        found.append(f"<tr><td>{'<td>'.join(map(escape, row))}\n")
    return "".join(found) + "</table>\n"

def show_tokens(cfg):  # samples as the trainer's first step does, or reads; scores as it does
    import opsdc
    device = opsdc.start_processes()
    opsdc.check_settings(vars(cfg))
    out = Path(cfg.out)
    check(not out.exists() or PAGE[:200] == out.read_text("utf-8", "replace")[:200],
          f"--out {out}: expected a new file, or an older page")
    bases = [opsdc.open_base(name, to_train=True) for name in (cfg.model, cfg.teacher) if name]
    tokenizer, told = bases[0].tokenizer, opsdc.read_instruction(cfg.instruction)
    check(bases[-1].tokenizer.get_vocab() == tokenizer.get_vocab(), f"--teacher {cfg.teacher}: expected the "
          f"tokens of {cfg.model}, found others")
    problems = opsdc.from_rank_0(opsdc.make_problems, cfg, bases[0], told)
    rollouts = read_responses(cfg, problems, tokenizer) if cfg.given else None
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens if rollouts is None else max(
        len(prompt) + len(r.ids) for r in rollouts for prompt in problems[r.index][2:])
    context = min(map(opsdc.context_of, bases))
    check(longest <= context, f"expected at most the model's context, {context} tokens, found responses that "
          f"take {longest} with their prompt: lower --max_response_tokens, or leave those in --data out")
    for base in bases if opsdc.dist.get_rank() == 0 else ():
        base.loaded = opsdc.read_weights(base)
    engine = None if rollouts else opsdc.RolloutEngine(bases[0], cfg)
    models = [opsdc.load_model(base, device, cfg) for base in bases]
    if engine:
        engine.sync(models[0])
        indices = opsdc.batch_at(len(problems), 0, cfg.samples, cfg.seed)
        rollouts = opsdc.sample_rollouts(engine, problems, indices, 1, tokenizer, cfg)
        engine.sleep()
    with opsdc.torch.no_grad():
        scores = [score(models[0], models[-1], batch, tokenizer, cfg) for r in rollouts
                  for batch in opsdc.make_micro_batches([r], problems, device, cfg)]
    about = f"Student: {cfg.model}. Teacher: {cfg.teacher or 'the same'}, told: {told}"
    if opsdc.dist.get_rank() == 0:
        out.write_text(page(tokenizer, problems, rollouts, scores, about), "utf-8")
        print(f"wrote {out}")

# ----------------------------------------------------------------------------------------------- COMMAND LINE
def write_summary(out, settings, benchmarks, finished):  # beside the benchmarks that are in it already
    import opsdc
    older = read_summary(out)["benchmarks"] if (out / "summary.json").exists() else {}
    summary = {"settings": settings, "finished": finished, "benchmarks": older | {
        name: summarise(records) for name, records in benchmarks.items()}}
    opsdc.replace_file(out / "summary.json", json.dumps(summary, indent=1))
    return summary

def read_parts(out, name, jobs, merge=False):
    """(records, jobs without one) of a benchmark's file and a killed run's parts, on any number of ranks, in
    the order of `jobs`. merge: into one file."""
    import opsdc
    key_of = lambda r: (r.get("id"), r.get("sample"), r.get("problem_hash"))
    paths = [p for p in out.glob("*.jsonl") if re.fullmatch(re.escape(name) + r"(\.rank-\d+)?", p.stem)]
    found, file = {key_of(r): r for path in paths for r in read_lines(path)}, out / f"{name}.jsonl"
    check(found.keys() <= {*map(key_of, jobs)}, f"--out {out}: {file.name} has other problems; give another")
    records = [found[key_of(job)] for job in jobs if key_of(job) in found]
    if merge:
        opsdc.replace_file(file, "".join(json.dumps(r) + "\n" for r in records))
        for part in {*paths} - {file}:
            part.unlink()
    return records, [job for job in jobs if key_of(job) not in found]

def prepare(args):  # all checks -> base, {benchmark: jobs}, settings, folder, {benchmark: jobs left}, Config
    import opsdc
    opsdc.check_settings(vars(args))
    args.instruction = None if args.instruction is None else opsdc.read_instruction(args.instruction)
    base, jobs = opsdc.open_base(args.model, to_train=False), {}
    model = os.path.basename(os.path.abspath(args.model))  # of `..` too
    out = Path(args.out or f"eval-{model}" + ("-concise" if args.instruction else ""))
    for source in [args.data] if args.data else args.benchmarks.replace(" ", "").split(","):
        name = Path(source.partition("=")[0]).stem
        name += f"-{len(jobs) + 1}" * (name in jobs)  # two sources of one name are two
        problems = opsdc.from_rank_0(load_problems, source, args.wrapper)
        jobs[name] = make_jobs(base.tokenizer, problems, args.samples, args.seed, args.instruction,
                               args.thinking, args.wrapper)
    prompts = [(job["prompt"], job["id"]) for those in jobs.values() for job in those]
    opsdc.check_ids(base, [prompt for prompt, _ in prompts])
    say(f"the first prompt:\n{base.tokenizer.decode(prompts[0][0])}")
    longest, worst = max((len(prompt), name) for prompt, name in prompts)
    context = opsdc.context_of(base, to_train=False)
    check(longest + args.max_tokens <= context, f"the prompt of problem {worst} has {longest} tokens, and "
          f"{args.model} holds {context}: lower --max-tokens {args.max_tokens}, or leave that problem out")
    cfg = opsdc.Config(model=args.model, max_prompt_tokens=longest, max_response_tokens=args.max_tokens,
                         seed=args.seed, vllm_tp=args.vllm_tp, vllm_memory=args.vllm_memory)
    settings = {"version": VERSION, "model": args.model, "model_hash": opsdc.model_hash(base),
                "template": digest(base.tokenizer.chat_template), **{name: getattr(args, name) for name in (
                    *SAMPLING, "max_tokens", "samples", "seed", "thinking", "wrapper", "instruction")}}
    names = "|".join(map(re.escape, jobs))
    claim_folder(out, "eval.lock",
                 rf"opsdc\.lock|summary\.json|{opsdc.UNFINISHED}|({names})(\.rank-\d+)?\.jsonl")
    found = read_summary(out)["settings"] if (out / "summary.json").is_file() else settings
    differ = [f"{k}: there {found.get(k)!r}, here {v!r}" for k, v in settings.items()
              if k != "model" and found.get(k) != v]  # a copy elsewhere is the same model: its weights are
    check(not differ, f"--out {out} holds another run ({'; '.join(differ)}); give another directory")
    return base, jobs, settings, out, {name: read_parts(out, name, jobs[name])[1] for name in jobs}, cfg

def start_engine(base, cfg):
    """A RolloutEngine with the weights that `base` names. vLLM looks for weights by patterns: it finds none
    below a folder with brackets, and others too where there are several formats. There it gets links."""
    import opsdc
    found = [*base.folder.glob("*.safetensors")] or [*base.folder.glob("*.bin")]
    if {*found} == {*base.weight_files} and glob.escape(str(base.folder)) == str(base.folder):
        return opsdc.RolloutEngine(base, cfg, load_format="auto")
    with tempfile.TemporaryDirectory() as links:
        for path in [*map(base.folder.joinpath, base.files), *base.weight_files]:
            link = Path(links, path.relative_to(base.folder))
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.absolute())
        return opsdc.RolloutEngine(dataclasses.replace(base, folder=Path(links)), cfg, load_format="auto")

def sample_and_write(engine, tokenizer, jobs, path, settings, block):
    """Appends the records of `jobs` to `path` as they end: once `block` have, or after two minutes, so that a
    kill loses little however long the responses are. No path: a rank that helps another's engine."""
    import opsdc
    from vllm import SamplingParams
    sampling = {name: settings[name] for name in (*SAMPLING, "max_tokens")}
    params = [SamplingParams(**sampling, seed=job["seed"], logprobs=0, detokenize=False) for job in jobs]
    queued = engine.llm.enqueue([{"prompt_token_ids": job["prompt"]} for job in jobs], params, use_tqdm=False)
    job_of = {name.partition("-")[0]: job for name, job in zip(queued, jobs)}  # vLLM adds a suffix in between
    pending, since, count = [], time.monotonic(), 0
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.llm.llm_engine.step():
            pending.append((job_of[output.request_id], opsdc.sampled(output.outputs[0])))
        last = not engine.llm.llm_engine.has_unfinished_requests()
        if path and pending and (len(pending) >= block or last or time.monotonic() - since > 120):
            records = make_records(tokenizer, *zip(*pending))
            with path.open("a") as file:
                file.writelines(json.dumps(r) + "\n" for r in records)
            pending, since, count = [], time.monotonic(), count + len(records)
            say(f"{path.stem}: {count} of {len(jobs)} samples; the last {len(records)}: accuracy "
                        f"{percent(mean(records, 'correct'))} %, {mean(records, 'tokens'):.0f} tokens")

def evaluate(args):
    import opsdc
    opsdc.start_processes()
    base, jobs, settings, out, todo, cfg = prepare(args)
    rank, barrier, engine, done = opsdc.dist.get_rank(), opsdc.dist.barrier, None, {}
    barrier()  # all have read before one writes
    if rank == 0:
        write_summary(out, settings, {}, finished=False)
    for name, left in todo.items():
        if rank == 0:  # a killed run's part may end in half a line: nothing is appended to it
            read_parts(out, name, jobs[name], merge=True)
        barrier()
        say(f"{name}: {len(left)} of {len(jobs[name])} samples are left to make")
        if left:
            engine = engine or start_engine(base, cfg)
            path = out / f"{name}.rank-{rank}.jsonl" if rank % cfg.vllm_tp == 0 else None
            sample_and_write(engine, base.tokenizer, engine.share(left), path, settings, args.block)
        barrier()  # all have written before one reads
        if rank == 0:
            done[name], missing = read_parts(out, name, jobs[name], merge=True)
            check(not missing, f"--out {out}: {len(missing)} of {len(jobs[name])} samples of {name} have no "
                  "record; repeat the command, which makes them")
    if rank == 0:
        print_table(write_summary(out, settings, done, finished=True))
        print(f"wrote {out}/summary.json")

def print_table(summary):  # a column for each benchmark, as in summary.json; shares in %
    found = summary["benchmarks"]
    names = [name for name in next(iter(found.values())) if name != "levels"]
    is_plain = lambda name, x: isinstance(x, int) or "tokens" in name and x is not None
    print(markdown(["in %, or tokens", *found], [
        [name, *(round(s[name], 1) if is_plain(name, s[name]) else percent(s[name]) for s in found.values())]
        for name in names]))

NUMBERS = {  # option: default, help
    "samples": (8, "per problem"), "max-tokens": (30000, "of a response"),
    "temperature": (SAMPLING["temperature"], "of sampling"), "top-p": (SAMPLING["top_p"], "of sampling"),
    "top-k": (SAMPLING["top_k"], "of sampling, 0: all"), "seed": (0, "of sampling"),
    "vllm-tp": (1, "ranks of an engine"),
    "vllm-memory": (0.9, "share of each GPU's memory for vLLM; no trainer is beside it"),
    "block": (128, "samples graded and written at a time, or what came in two minutes")}

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("What counts")[0],
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
    for name, (value, text) in NUMBERS.items():
        add(f"--{name}", type=type(value), default=value, help=f"{text} (default: {value})")
    add("--benchmarks", default="math500,aime24,aime25", help=f"{', '.join(BENCHMARKS)}; NAME=DIR: a copy")
    add("--model", required=True, help="hub id or directory")
    add("--data", help="as of opsdc.py, with answers, instead of benchmarks")
    add("--out", help="directory of the records and the summary")
    add("--instruction", help="as of opsdc.py: the concise prompt baseline")
    add("--wrapper", choices=("math", "none"), default="math", help="as of opsdc.py")
    add("--thinking", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args([re.sub(r"^--\w+", lambda m: m[0].replace("_", "-"), a) for a in argv])
    return args, evaluate

def refuse(error):  # once, though every rank finds it
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
    opsdc.run_and_exit(lambda: command(args))

if __name__ == "__main__":
    main(sys.argv[1:])
