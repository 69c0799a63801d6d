"""The data set tool: raw pictures to aligned crops. `python -m encoder.prepare --help`"""
