"""ms-swift trains a target: a plugin names the callback, and the command line asks for it.

swift sft --external_plugins examples/trainers/ms_swift_plugin.py --callbacks qtarget ...
"""

from swift.callbacks import callbacks_map

import qtarget as qt

callbacks_map["qtarget"] = lambda args, trainer: qt.TargetCallback("dft")  # the line
