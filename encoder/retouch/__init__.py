"""Drawings put right, for a style to learn. `python -m encoder.retouch --help`"""
