"""Rows of the sample data, answered by predict.py in this process."""

import json

from reference import ROOT

import predict


def write_rows(path, num_rows=5):
    rows = (ROOT / "data" / "spo_1.json").read_text(encoding="utf-8").splitlines()[:num_rows]
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def answers(model, test_path, output_path, *flags):
    arguments = ["--model_path", str(model), "--test_path", test_path, "--output_path", str(output_path)]
    predict.main([*arguments, "--max_new_tokens", "8", *flags])
    return [json.loads(line) for line in output_path.read_text(encoding="utf-8").splitlines()]
