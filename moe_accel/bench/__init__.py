"""`moe-accel bench`: one fine-tuning step, stock transformers and others beside moe-accel, checked before it is timed.

    options.py    what is asked for            shapes.py     the released models' numbers, as data
    run.py        one process after the other  table.py      the report as a table
    worker.py     what one process does        arms.py       the ways to compute that are compared
    suites.py     what a step is               routing.py    which experts the tokens go to
    check.py      loss and gradients agree     flops.py      floating-point operations of the model
    ceilings.py   what this GPU can do at most

Everything on the left but `worker.py`, and nothing else, runs in the process that was started: it imports no torch.
"""
