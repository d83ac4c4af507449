"""The names and signatures by which inference engines call FlashMLA: ``vllm`` and ``sglang``, a module each.

Each has ``install()``, which puts this library's dense decoding in place of the engine's own. Importing them imports
no engine. They are tested against the signatures and the forms of call that the engines have, on CPU arrays; not
inside a running engine.
"""
