"""Responses and scores of trained models.

`generate` samples responses, `score` runs a reward model, `terminal` is the chat.
Imports `io` and below. Start with `generate`.
"""
