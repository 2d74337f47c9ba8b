"""The shortest config with every section, for the tests of settings."""


def whole():
    optimizer = {"learning_rate": 1e-3}
    return {
        "model": {"scratch": {}, "vocabulary_data": "{workdir}/data/texts.jsonl"},
        "sft": {"data": "texts.jsonl", "optimizer": dict(optimizer)},
        "reward": {"data": "pairs.jsonl", "optimizer": dict(optimizer)},
        "ppo": {
            "prompts": "prompts.jsonl",
            "value_learning_rate": 1e-3,
            "optimizer": dict(optimizer),
        },
        "evaluate": {"prompts": "test.jsonl"},
    }


def changed(fields):
    """`whole()` with fields set, {"ppo.kl_coef": 0.1}; one whose value is `...` is taken out."""
    config = whole()
    for name, value in fields.items():
        *sections, field = name.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        if value is ...:
            del place[field]
        else:
            place[field] = value
    return config
