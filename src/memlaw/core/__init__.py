"""What everything else stands on: errors, files, progress, intervals, provenance.

It knows nothing of the rest of the package, and imports no torch.
"""
