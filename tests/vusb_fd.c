/* vusb_fd.c - preloaded before libvusbfs.so: what the virtual bus lacks for a device node that somebody else opened.
 *
 * The kernel's node also tells where the device is (USBDEVFS_CONNECTINFO), gives its descriptors to read() and runs
 * control requests without a URB (USBDEVFS_CONTROL, here GET_CONFIGURATION only).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/usbdevice_fs.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define NODE "/dev/bus/usb/001/002"
#define DESCRIPTORS "/sys/bus/usb/devices/1-1/descriptors"
#define CONFIGURATION "/sys/bus/usb/devices/1-1/bConfigurationValue"
#define MAXFD 1024
#define NEXT(name, ret, ...) ret (*next)(__VA_ARGS__) = (ret (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static char is_node[MAXFD];
static size_t place[MAXFD];

static int tracked(int fd) { return fd >= 0 && fd < MAXFD && is_node[fd]; }

static int opened(const char *path, int fd)
{
    if (fd >= 0 && fd < MAXFD) {
        is_node[fd] = !strcmp(path, NODE);
        place[fd] = 0;
    }
    return fd;
}

#define OPEN(name)                                      \
    int name(const char *path, int flags, ...)          \
    {                                                   \
        NEXT(#name, int, const char *, int, ...);       \
        va_list arguments;                              \
        va_start(arguments, flags);                     \
        int mode = va_arg(arguments, int);              \
        va_end(arguments);                              \
        return opened(path, next(path, flags, mode));   \
    }
OPEN(open)
OPEN(open64)

int close(int fd)
{
    NEXT("close", int, int);
    if (tracked(fd)) is_node[fd] = 0;
    return next(fd);
}

static ssize_t contents(const char *path, char *to, size_t size)
{
    NEXT("open", int, const char *, int, ...);
    int fd = next(path, O_RDONLY | O_CLOEXEC);
    ssize_t count = fd < 0 ? -1 : pread(fd, to, size, 0);
    if (fd >= 0) close(fd);
    return count;
}

ssize_t read(int fd, void *to, size_t size)
{
    NEXT("read", ssize_t, int, void *, size_t);
    if (!tracked(fd)) return next(fd, to, size);
    char all[4096];
    ssize_t count = contents(DESCRIPTORS, all, sizeof all);
    if (count < 0) return -1;
    count = (size_t)count > place[fd] ? count - (ssize_t)place[fd] : 0;
    if ((size_t)count > size) count = (ssize_t)size;
    memcpy(to, all + place[fd], (size_t)count);
    place[fd] += (size_t)count;
    return count;
}

#define SEEK(name, type)                                \
    type name(int fd, type offset, int whence)          \
    {                                                   \
        NEXT(#name, type, int, type, int);              \
        if (!tracked(fd)) return next(fd, offset, whence); \
        if (whence != SEEK_SET) { errno = EINVAL; return -1; } \
        place[fd] = (size_t)offset;                     \
        return offset;                                  \
    }
SEEK(lseek, off_t)
SEEK(lseek64, off64_t)

int ioctl(int fd, unsigned long request, ...)
{
    NEXT("ioctl", int, int, unsigned long, ...);
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (!tracked(fd)) return next(fd, request, argument);
    if (request == USBDEVFS_CONNECTINFO) {
        struct usbdevfs_connectinfo *info = argument;
        info->devnum = 2;
        info->slow = 0;
        return 0;
    }
    if (request == USBDEVFS_CONTROL) {
        struct usbdevfs_ctrltransfer *control = argument;
        char text[16] = "";
        if (control->bRequestType != 0x80 || control->bRequest != 8) { errno = EPIPE; return -1; }
        if (contents(CONFIGURATION, text, sizeof text - 1) < 0) return -1;
        *(unsigned char *)control->data = text[0] >= '1' ? (unsigned char)(text[0] - '0') : 0;
        return 1;
    }
    return next(fd, request, argument);
}
