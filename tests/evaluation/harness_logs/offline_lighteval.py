"""lighteval's command where no hub answers: its own tasks ask the hub for judges as they are imported."""

import sys

import huggingface_hub

huggingface_hub.HfApi.list_models = lambda self, **settings: ["a judge that no task here asks"]

from lighteval.__main__ import app  # noqa: E402

sys.exit(app())
