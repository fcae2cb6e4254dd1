"""How well a model answers: tasks (files of questions), prompts (questions as token ids), strategies (which prompts,
and whose vote), answers (read and counted), metrics (with intervals), report (lines, tables, comparisons). A strategy
asks the model for likelihoods (likelihood), nearest questions (neighbours), or text; score is the simplest of all.
"""
