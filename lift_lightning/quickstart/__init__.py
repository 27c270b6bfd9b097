"""A small pretrained language model that comes with the package, and what makes it worth fine-tuning.

`model/` is a LLaMA of a few million parameters with its tokenizer; `lift-lightning/quickstart` names it wherever a
model is asked for. Its whole world is generated: `world` (facts about towns), `problems` (arithmetic word problems)
and `text` (documents for pretraining, questions for training and testing). `pretrain` made the model.
"""
