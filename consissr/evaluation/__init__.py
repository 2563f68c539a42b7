"""Evaluation of restored images: folders in, tables, figures and a report out. Start reading in `evaluate.py`.

This package works on images alone. It imports no model (`complexity` excepted), and pyiqa only where a learned metric
is asked for.
"""
