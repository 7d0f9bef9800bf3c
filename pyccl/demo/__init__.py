"""The main job: several processes train one character model while one is killed and one joins.

``corpus`` and ``model`` are pure (files and NumPy, no ``pyccl``); ``peer`` is the training script, the part that a
reader would copy; ``progress`` is what the orchestrator knows of a run and its verdict, pure as well; ``orchestrator``
owns the processes; ``show`` and ``plot`` draw.
"""
