"""Data: which pictures and labels a data set has, how a picture becomes a network's input,
and reading arrays and property tables with errors that teach. Imports without torch.
"""
# ---------------------------------------------------------------- data sets and pictures

# ---------------------------------------------------------------- arrays and tables on disk
