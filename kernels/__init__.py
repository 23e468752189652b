"""Operations: each a plain torch reference, which is its specification, beside its fast forms.

Imports nothing of ours. `ops.Ops` is the face the models and the worker see; which implementation
stands behind it is decided once, by device, when the worker starts.
"""
