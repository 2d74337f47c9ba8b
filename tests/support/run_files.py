"""The files that a run leaves, written by hand and read."""

import json


def read_jsonl(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_run(folder, *, metrics=(), samples=(), results=None, config=None, steps=None):
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics", metrics), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, tree in (("results", results), ("config", config)):
        if tree is not None:
            (folder / f"{name}.json").write_text(json.dumps(tree))
    for stage, count in (steps or {}).items():
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "stage.json").write_text(json.dumps({"num_steps": count}))
    return folder
