"""How well a model answers: tasks (files of questions), prompts (questions as token ids), score (the accuracy)."""
