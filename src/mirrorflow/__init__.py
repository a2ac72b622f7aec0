"""What weight decay does to a model, and when to switch it off: the public names.

`__init__.pyi` lists them. Each is imported on first use, so that ``mirrorflow --help`` does not
wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
