#!/bin/sh
# /init of the test guest (busybox ash): loads modules for what is plugged in, and runs the commands that come through
# a virtio serial port. _agent.py has the other side, and the lines that are exchanged.

/bin/busybox mount -t proc proc /proc # busybox finds its other commands through /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
export HOME=/ PATH=/bin:/sbin:/usr/bin
dmesg -n 7 # a quick boot is a silent one, but what USB does from here on helps to explain a failure

uevent /sbin/hotplug > /dev/null &
cat /sys/bus/pci/devices/*/modalias | xargs modprobe -q -a virtio_console ehci_pci # which must be there before UHCI

port=/dev/vport0p1
tries=0
while [ ! -e $port ] && [ $tries -lt 1000 ]; do
    tries=$((tries + 1))
    usleep 10000
done
exec 3<> $port || poweroff -f

# run_command ID: runs the script, and answers when it has ended
run_command() {
    job=/run/$1
    setsid sh "$job.script" < "$job.input" > "$job.output" 2> "$job.errors" 3>&- &
    echo $! > "$job.pid"
    wait $! 2> /dev/null # which would tell of stopped ones
    code=$?
    until mkdir /run/lock 2> /dev/null; do usleep 1000; done # answers must not be mixed
    {
        echo "$1" $code $(stat -c %s "$job.output" "$job.errors")
        cat "$job.output" "$job.errors"
    } >&3
    rmdir /run/lock
    rm -f "$job".*
}

# stop_command ID: kills it, with what it started; it may have ended, or not have begun yet
stop_command() {
    until pid=$(cat "/run/$1.pid") && kill -9 "-$pid"; do
        [ -e "/run/$1.script" ] || break
        usleep 1000
    done 2> /dev/null
}

silence=0
while [ $silence -lt 100 ]; do # nobody is at the other end yet, or any more
    if ! read -r verb id length script <&3; then
        silence=$((silence + 1))
        usleep 20000
        continue
    fi
    silence=0
    case $verb in
        run)
            echo "$script" | base64 -d > "/run/$id.script"
            : > "/run/$id.input"
            [ "$length" -eq 0 ] || dd bs="$length" count=1 iflag=fullblock <&3 > "/run/$id.input" 2> /dev/null
            run_command "$id" &
            ;;
        stop) stop_command "$id" ;;
    esac
done
poweroff -f
