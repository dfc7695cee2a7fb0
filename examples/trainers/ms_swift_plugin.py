"""ms-swift trains a target: a plugin registers the callback under a name, which you pass on the command line.

    swift sft --external_plugins examples/trainers/ms_swift_plugin.py --callbacks qtarget ...

Replace the dots with the settings of your run.
"""

from swift.callbacks import callbacks_map

import qtarget as qt

callbacks_map["qtarget"] = lambda args, trainer: qt.TargetCallback("dft")  # the line
