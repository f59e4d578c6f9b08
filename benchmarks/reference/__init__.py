"""The methods as published training codes spell them, in plain PyTorch: the baseline of every ratio, the tests' oracle.

In our own words, with the habits that cost time kept: autocast over fp32 weights, a frozen teacher's included; every
patch embedded, then dropped; argsort, and gathers by indices as wide as what they gather (dBOT, MAE); boolean indexing
(VideoMAE, AMD); explicit attention scores; losses as chains of full-size temporaries; in :mod:`update`, AdamW tensor by
tensor and a wait for the device; in :mod:`loader`, Pillow and floats. Submodules carry the engine's names, so weights
copy across with ``load_state_dict``. One thing is newer: bf16 in place of fp16, so that no loss needs to be scaled.

:mod:`current` is the same mathematics without the habits.
"""
