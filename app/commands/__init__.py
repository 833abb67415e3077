"""The commands, one module a subject: plain typed functions that `reasonscope.app.cli` registers.

Heavy imports (torch, transformers, plotly) stand inside the functions, so that `reasonscope --help` answers at once.
"""
