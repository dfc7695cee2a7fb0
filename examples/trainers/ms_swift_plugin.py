"""ms-swift trains a target: a plugin gives the callback a name, and the command line asks for it.

    swift sft --external_plugins examples/trainers/ms_swift_plugin.py --callbacks qtarget ...

In place of the dots: the settings that the run has without it.
"""

from swift.callbacks import callbacks_map

import qtarget as qt

callbacks_map["qtarget"] = lambda args, trainer: qt.TargetCallback("dft")  # the line
