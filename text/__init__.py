"""Text in and out: tokenizer, chat templates, incremental detokenizer, stop strings.

Data in: a checkpoint's `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`; text or
messages. Data out: token ids; and, token by token, text that never splits a character and never
shows part of a stop string. A leaf: imports nothing of ours and no torch, so the API process and
the offline `LLM` share it.
"""
