#!/bin/sh
# Called by busybox's uevent for each event of the kernel: loads the module for a device that has come.
[ "$ACTION" != add ] || [ -z "$MODALIAS" ] || modprobe -q "$MODALIAS"
