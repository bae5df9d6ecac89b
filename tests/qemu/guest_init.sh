#!/bin/sh
# /init of the test guest (busybox ash): uses the one USB disk it is given, reports, powers off.
#
# Kernel command line:
#   usbredir.scenario=readonly    checksums of the disk and of its files
#   usbredir.scenario=readwrite   the same, then writes two files and reads all files again
#   usbredir.scenario=speed       times reads and writes; overwrites the disk (4 MiB or more)
#   usbredir.mib=N                readwrite: size of the random file; speed: amount per measurement (default 4)
#   usbredir.repeat=N             speed: rounds (default 1)
#   usbredir.limit=SECONDS        powers off after this time whatever happens (default 300)
#
# Reports go through /dev/kmsg, so that they cannot be mixed with the kernel's own lines on the console.
# guest.py reads them. The last one is DONE or FAILED.

scenario=readonly mib=4 repeat=1 limit=300
disk=/dev/sda

say() { echo "<1>usbredir-guest: $*" > /dev/kmsg; }

finish() {
    say "$@"
    poweroff -f
    exit 1
}

must() { "$@" || finish FAILED "$*"; }

now() { cut -d ' ' -f 1 /proc/uptime; }

checksum() { sha256sum "$@" | cut -d ' ' -f 1; }

checksum_disk() { dd if=$disk bs=1M iflag=direct 2> /dev/null | checksum; }

# report_files KEY: checksum of each file of the mounted disk
report_files() {
    find /mnt -type f | sort | while read -r file; do
        say "$1" "$(checksum "$file")" "${file#/mnt/}"
    done
}

mount_disk() { must mount -t vfat -o "$1,codepage=437,iocharset=ascii" $disk /mnt; }

# Nothing that is read afterwards may come from memory.
forget() {
    must umount /mnt
    must blockdev --flushbufs $disk
    echo 3 > /proc/sys/vm/drop_caches
}

wait_disk() {
    local tries=0
    while [ ! -b $disk ]; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || finish FAILED "no $disk after 30 s"
        usleep 50000
    done
}

describe_disk() {
    cd -P /sys/block/sda/device || finish FAILED "no sysfs entry of $disk"
    while [ ! -e idVendor ] && [ "$PWD" != / ]; do cd ..; done
    local name
    for name in idVendor idProduct bcdDevice speed manufacturer product serial; do
        [ ! -e $name ] || say $name "$(cat $name)"
    done
    cd /
    say size $(($(cat /sys/block/sda/size) * 512))
    say write_protected "$(cat /sys/block/sda/ro)"
}

readonly_scenario() {
    say disk "$(checksum_disk)"
    mount_disk ro
    report_files file
    forget
}

readwrite_scenario() {
    readonly_scenario
    mount_disk rw
    must dd if=/dev/urandom of=/random bs=1M count="$mib" 2> /dev/null
    local existing name
    existing=$(find /mnt -type f | sort | tail -n 1)
    name="written by the guest.bin"
    say written "$(checksum /random)" "$name"
    must cp /random "/mnt/$name"
    if [ -n "$existing" ]; then
        say written "$(checksum "$existing")" copy.bin
        must cp "$existing" /mnt/copy.bin
    fi
    sync
    forget
    mount_disk ro
    report_files reread
    forget
    say disk_after "$(checksum_disk)"
}

# time_loop NAME BYTES COMMAND...: reports the bytes moved and the seconds taken, which have two decimals
time_loop() {
    local name=$1 bytes=$2 begin
    shift 2
    begin=$(now)
    "$@"
    say time "$name" "$bytes" "$(echo "$begin $(now)" | awk '{print $2 - $1}')"
}

# whole_passes PASSES BLOCK_SIZE COUNT DD-ARGUMENT...
whole_passes() {
    local passes=$1 size=$2 count=$3
    shift 3
    while [ "$passes" -gt 0 ]; do
        must dd bs="$size" count="$count" "$@" 2> /dev/null
        passes=$((passes - 1))
    done
}

# random_reads COUNT BLOCKS DD-ARGUMENT...: one dd for each 4 KiB, at places that are the same in every run
random_reads() {
    local left=$1 blocks=$2 position=1
    shift 2
    while [ "$left" -gt 0 ]; do
        position=$(((position * 1103515245 + 12345) % 2147483648))
        must dd bs=4096 count=1 skip=$((position % blocks)) of=/dev/null "$@" 2> /dev/null
        left=$((left - 1))
    done
}

speed_scenario() {
    local blocks count passes moved
    blocks=$(($(cat /sys/block/sda/size) / 8))
    count=$((blocks / 256)) # of the whole disk, in MiB
    [ "$count" -le "$mib" ] || count=$mib
    passes=$((mib / count))
    moved=$((passes * count * 1048576))
    while [ "$repeat" -gt 0 ]; do
        time_loop read_1048576 $moved whole_passes $passes 1048576 $count if=$disk of=/dev/null iflag=direct
        time_loop write_1048576 $moved whole_passes $passes 1048576 $count if=/dev/zero of=$disk oflag=direct conv=notrunc
        time_loop read_4096 $((1024 * 4096)) whole_passes 1 4096 1024 if=$disk of=/dev/null iflag=direct
        time_loop random_read_4096 $((256 * 4096)) random_reads 256 $blocks if=$disk iflag=direct
        # Starting a dd takes an emulated processor long; this is what it costs without the disk.
        time_loop random_overhead $((256 * 4096)) random_reads 256 $blocks if=/dev/null
        repeat=$((repeat - 1))
    done
}

/bin/busybox mount -t proc proc /proc # busybox finds its other commands through /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
dmesg -n 7 # a quick boot is a silent one, but what USB does from here on helps to explain a failure

for word in $(cat /proc/cmdline); do
    case $word in
        usbredir.scenario=*) scenario=${word#*=} ;;
        usbredir.mib=*) mib=${word#*=} ;;
        usbredir.repeat=*) repeat=${word#*=} ;;
        usbredir.limit=*) limit=${word#*=} ;;
    esac
done
(sleep "$limit" && finish FAILED "not done after $limit s") &

# Some modules are only for other processors and refuse to load; what really lacks shows when there is no disk.
while read -r module; do
    case $module in
        usb-storage.ko) insmod "/modules/$module" delay_use=0 ;;
        *) insmod "/modules/$module" ;;
    esac
done < /modules/order

say ready "$(now)"
wait_disk
say attached "$(now)"
describe_disk
case $scenario in
    readonly | readwrite | speed) "${scenario}_scenario" ;;
    *) finish FAILED "no scenario $scenario" ;;
esac
say seconds "$(now)"
finish DONE
