"""What a policy responds to: prompts, read and tokenised.

Dimension key: N prompts, P prompt tokens.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ppo_jax.batches import encode_prompts, usable
from ppo_jax.data import load_prompts
from ppo_jax.formats import naming_data
from ppo_jax.structs import Prompts
from ppo_jax.token_rows import token_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData:
    """The prompts of a file that are of use."""

    texts: list[str]  # N; those of messages as the chat template writes them
    prompts: Prompts  # [N, P]
    left_out: Mapping[str, int]  # why: how many of the records


def prompt_data(
    path: str | os.PathLike, tokenizer: Any, *, max_length: int, field: str = "ppo.prompts"
) -> PromptData:
    """Read prompts; leave out those without a token, those repeated and those too long.

    None is cut, since that would change the task.

    Args:
        path: as for `formats.read_rows`.
        tokenizer: of the policy.
        max_length: tokens, `ppo.max_prompt_length`.
        field: that names the file, for the message of an error.

    Raises:
        ValueError: a row is malformed, or no prompt is left.
    """
    texts = load_prompts(path, tokenizer)
    rows = token_rows([((text, False),) for text in texts], tokenizer, append_eos=False)
    lengths = [len(row.ids) for row in rows]
    flaws = ["" if length else "blank" for length in lengths]
    with naming_data(field, path, "ppo.max_prompt_length"):
        kept, left_out = usable(texts, flaws, lengths, max_length)
    texts = [texts[i] for i in kept]
    prompts = encode_prompts(texts, tokenizer, max_length=max_length)
    return PromptData(texts=texts, prompts=prompts, left_out=left_out)
