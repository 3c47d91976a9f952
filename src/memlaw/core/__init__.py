"""What everything else stands on: errors, files, progress, intervals, the criterion, old names.

In: nothing of the package. Out: what all rooms share. Imports no torch.
"""
