"""The console command `iet-finetune`: one file a command, and how a command ends for the person at the terminal."""

from .program import main as main
from .program import run as run
from .program import train as train
