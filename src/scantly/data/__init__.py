"""From a folder of scans to batches: dataset folder, checks, splits, plan, prepared store, batches.

Import the modules themselves, for instance ``from scantly.data.dataset import Dataset``: some need PyTorch
and some do not.
"""
