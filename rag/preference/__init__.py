"""Training and testing how a model chooses between what it remembers and what it reads.

``sources`` makes question items, ``pairs`` turns them into preference pairs stage by stage (KnowPO, arXiv:2408.03297),
``synthesis`` makes the other kinds of training data, ``train`` trains an adapter, ``suites`` measures.
"""
