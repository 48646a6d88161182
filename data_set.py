"""Rows: read and checked, encoded once, kept for the next run."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass

ENCODING_VERSION = 1  # part of the cache key: raise it when the same row would give other ids


@dataclass(frozen=True)
class Columns:
    """Names of the fields of a row; `prompt` replaces instruction + input where it is given."""

    prompt: str | None = None
    response: str = "output"

    @property
    def sources(self):
        """Fields whose texts, put together, are the query."""
        return (self.prompt,) if self.prompt else ("instruction", "input")


def data_files(paths):
    """Files behind `--train_path`: files as given, folders as their *.json and *.jsonl, sorted."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            names = [n for n in sorted(os.listdir(path)) if n.endswith((".json", ".jsonl")) and not n.startswith(".")]
            inside = [os.path.join(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
            if not inside:
                raise ValueError(f"{path}: no *.json or *.jsonl file in this folder: put rows there or name a file")
            files += inside
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder: check the path")
    return files


def read_objects(path):
    """Yield (place, object) from JSON Lines or one JSON array; place is file:line, or file:row of an array."""
    with open_rows(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from read_array(path)
        return
    with open_rows(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            text = decode_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)
            if text.strip():
                try:
                    yield place, json.loads(text)
                except json.JSONDecodeError as error:
                    raise not_json(place, text, f"{error.msg} at column {error.colno}") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                    raise not_json(place, text, error) from None


def open_rows(path):
    """The file's bytes; ValueError where it may not be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None


def not_json(place, text, reason):
    """The error for a line that is not JSON; it shows how the line begins."""
    return ValueError(f"{place}: {text.strip()[:60]!r}: not a JSON object ({reason}): mend or remove it")


def read_array(path):
    """Yield (place, object) from a file that holds one JSON array."""
    with open_rows(path) as file:
        lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    text = "\n".join(decode_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not a JSON array ({error.msg}): mend this line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON array ({error}): give rows of plain strings") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:row {number}", row


def decode_line(line, place):
    """UTF-8 text of bytes; ValueError with the place otherwise."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start} of the line"
        raise ValueError(f"{place}: not UTF-8 ({reason}): save the file as UTF-8") from None


def read_rows(paths, columns, need_response=True):
    """Yield {"query", "answer", "place"} of every row; ValueError with file:line for the first that is not one.

    A row is an object with string fields; the answer must not be empty where it is needed.
    """
    num_rows = 0
    for path in data_files(paths):
        for place, row in read_objects(path):
            yield check_row(row, place, columns, need_response)
            num_rows += 1
    if not num_rows:
        raise ValueError(f"{' '.join(paths)}: no row in it: give at least one")


def json_type(value):
    """What JSON calls the value, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def check_row(row, place, columns, need_response):
    """One checked row."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {json_type(row)}, not an object: a row is {{...}} with string fields")
    names = [*columns.sources, columns.response] if need_response else list(columns.sources)
    for name in names:
        if name not in row:
            raise ValueError(
                f"{place}: no field {name!r} (it has {', '.join(map(repr, row))[:200] or 'none'}):"
                " add it, or name yours with --prompt_column and --response_column"
            )
        if not isinstance(row[name], str):
            raise ValueError(f"{place}: field {name!r} is {json_type(row[name])}: it must be a string")
        try:
            row[name].encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{place}: field {name!r} holds half a surrogate pair: it must be valid text") from None
    query = "".join(row[name] for name in columns.sources)
    if not query.strip():
        raise ValueError(f"{place}: {' and '.join(columns.sources)} empty: a row needs a question")
    answer = row.get(columns.response)
    if need_response and not answer.strip():
        raise ValueError(f"{place}: field {columns.response!r} is empty: a row needs an answer to learn")
    return {"query": query, "answer": answer if isinstance(answer, str) else None, "place": place}


def encode_row(query, answer, tokenizer, prompt, max_len, max_src_len):
    """One training row as ids, with what was cut.

    Returns input_ids (at most max_len), num_unlabelled (positions before the first label), and the numbers of
    source and answer ids that found no room. The id that ends the answer is never cut. `prompt` is the family's
    prompt module.
    """
    prompt_ids, source_cut = prompt.encode_prompt(tokenizer, query, max_src_len=max_src_len)
    answer_ids = prompt.encode_answer(tokenizer, answer)
    room = max_len - len(prompt_ids) - 1
    answer_cut = max(0, len(answer_ids) - room)
    input_ids = prompt_ids + answer_ids[: len(answer_ids) - answer_cut] + prompt.stop_ids(tokenizer)[:1]
    return {
        "input_ids": input_ids,
        "num_unlabelled": len(prompt_ids) - prompt.SUPERVISED_PROMPT_IDS,
        "source_cut": source_cut,
        "answer_cut": answer_cut,
    }


def cache_key(files, tokenizer, settings):
    """SHA-256 over the rows' bytes, the tokenizer's files and everything that decides the ids."""
    digest = hashlib.sha256(json.dumps([ENCODING_VERSION, settings], sort_keys=True).encode())
    for path in [*files, tokenizer.vocab_file]:
        digest.update(b"\0file\0")
        with open_rows(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def cache_folder():
    """Where encoded rows are kept: beside the other caches of the `datasets` library."""
    import datasets

    return os.path.join(datasets.config.HF_DATASETS_CACHE, "chatglm-rows")


def load_rows(paths, columns, tokenizer, mode, max_len, max_src_len, is_skip):
    """The encoded training set: a memory-mapped `datasets.Dataset` with input_ids, num_unlabelled, num_labels, and
    a dict of counts. Encoded by the first caller, read from the cache by all later ones (ranks and runs)."""
    import datasets

    settings = [mode.name, columns.prompt, columns.response, max_len, max_src_len, is_skip]
    folder = os.path.join(cache_folder(), cache_key(data_files(paths), tokenizer, settings))
    if not os.path.isdir(folder):
        encode_to_folder(folder, paths, columns, tokenizer, mode.prompt, max_len, max_src_len, is_skip)
    rows = datasets.load_from_disk(folder)
    with open(os.path.join(folder, "counts.json"), encoding="utf-8") as file:
        return rows, json.load(file)


def encode_to_folder(folder, paths, columns, tokenizer, prompt, max_len, max_src_len, is_skip):
    """Encode all rows into `folder`, which appears whole or not at all."""
    import datasets

    counts = dict.fromkeys(
        ("rows", "skipped", "rows_cut", "source_tokens_cut", "answer_tokens_cut", "longest", "tokens", "labels"), 0
    )

    def encoded():
        for row in read_rows(paths, columns):
            item = encode_row(row["query"], row["answer"], tokenizer, prompt, max_len, max_src_len)
            length = len(item["input_ids"]) + item["source_cut"] + item["answer_cut"]
            counts["longest"] = max(counts["longest"], length)
            if item["source_cut"] or item["answer_cut"]:
                counts["rows_cut"] += 1
                counts["source_tokens_cut"] += item["source_cut"]
                counts["answer_tokens_cut"] += item["answer_cut"]
                if is_skip:
                    counts["skipped"] += 1
                    continue
            num_labels = len(item["input_ids"]) - item["num_unlabelled"]
            counts["rows"] += 1
            counts["tokens"] += len(item["input_ids"])
            counts["labels"] += num_labels
            yield {
                "input_ids": item["input_ids"],
                "num_unlabelled": item["num_unlabelled"],
                "num_labels": num_labels,
            }

    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "num_unlabelled": datasets.Value("int32"),
            "num_labels": datasets.Value("int32"),
        }
    )
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        scratch = tempfile.mkdtemp(dir=os.path.dirname(folder))
    except OSError as error:
        raise ValueError(
            f"{os.path.dirname(folder)}: encoded rows cannot be kept there ({error.strerror}):"
            " set HF_DATASETS_CACHE to a folder that you may write"
        ) from None
    try:
        with datasets.arrow_writer.ArrowWriter(path=os.path.join(scratch, "rows.arrow"), features=features) as writer:
            for item in encoded():
                writer.write(item)
            writer.finalize()
        if not counts["rows"]:
            raise ValueError(
                f"{' '.join(paths)}: --is_skip left no row of {counts['skipped']}: raise --max_len or --max_src_len"
            )
        whole = os.path.join(scratch, "whole")
        rows = datasets.Dataset.from_file(os.path.join(scratch, "rows.arrow"))
        rows.save_to_disk(whole)
        with open(os.path.join(whole, "counts.json"), "w", encoding="utf-8") as file:
            json.dump(counts, file)
        try:
            os.rename(whole, folder)
        except OSError:  # another run was faster and its folder holds the same
            if not os.path.isdir(folder):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def describe_counts(counts, max_len, max_src_len, is_skip):
    """What a run says once about its rows."""
    share = counts["labels"] / max(1, counts["tokens"])
    text = (
        f"rows: {counts['rows']:,} with {counts['tokens']:,} tokens, {counts['labels']:,} of them supervised"
        f" ({share:.0%}); the longest has {counts['longest']:,}"
    )
    if counts["rows_cut"]:
        done = f"left out {counts['skipped']:,} rows" if is_skip else f"cut {counts['rows_cut']:,} rows"
        text += (
            f"\nrows: {done} over --max_len {max_len} / --max_src_len {max_src_len}:"
            f" {counts['source_tokens_cut']:,} source and {counts['answer_tokens_cut']:,} answer tokens lost"
        )
    return text


def show_row(row, tokenizer):
    """The first row as the model sees it: `【` before the supervised part and `】` behind it."""
    ids, start = list(row["input_ids"]), row["num_unlabelled"]
    prompt, supervised = (text_with_control_tokens(part, tokenizer) for part in (ids[:start], ids[start:]))
    return f"first row ({len(ids)} tokens): {prompt}【{supervised}】"


def text_with_control_tokens(ids, tokenizer):
    """Decoded text in which control tokens stand by name; decoding alone drops some of them, such as `</s>`."""
    text, run = "", []
    for token_id in ids:
        name = tokenizer.convert_ids_to_tokens(token_id)
        if token_id in tokenizer.control_ids and tokenizer.piece_text(name) == name:  # and not white space
            text += tokenizer.decode(run) + name
            run = []
        else:
            run.append(token_id)
    return text + tokenizer.decode(run)
