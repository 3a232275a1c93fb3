"""lm-eval, both ways: klbench's tasks as tasks of lm-eval (`tasks`), and a policy's figures on any task of lm-eval (`kept`).

lm-eval is imported where it is used: it takes seconds.
"""
