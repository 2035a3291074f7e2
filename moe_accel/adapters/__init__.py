"""LoRA adapters of mixture-of-experts models: read in any dialect, written in two, merged into their base.

`dialect.py` says what an adapter file holds, `convert.py` writes it as PEFT or as serving engines read it, `merge.py`
adds it to a checkpoint in any layout of `converters/`.
"""
