"""Methods: one file per paper, the contract in :mod:`scantly.methods.base`, shared pieces in ``parts``.

The catalogue is read without importing torch: see :mod:`scantly.methods.catalogue`.
"""
