"""The methods as published training codes spell them, in plain eager PyTorch: the baseline of every ratio.

In our own words, with the habits that cost time kept. Submodules carry the engine's names, so weights copy across with
``load_state_dict``.
"""
