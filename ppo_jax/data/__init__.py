"""From files to batches of tokens.

`readers` reads JSON lines, Parquet and hub data sets; `records`, `preferences`, `ratings` and
`prompts` give rows a type; `chat` renders templates; `encode` and `packing` make arrays.
Imports `distributed`, `config` and below. Start with `records`, then `encode`.
"""
