/* Requests to a disk past the page cache, one at a time, in the guest of qemu.py.
 *
 *   cdisk read|write|random DEVICE SIZE SECONDS    prints how many requests of SIZE bytes it made, and the seconds they took
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int writing = !strcmp(argv[1], "write"), random = !strcmp(argv[1], "random");
    size_t size = atol(argv[3]);
    double start, spent, seconds = atof(argv[4]);
    long count = 0, places;
    void *data;
    int fd = open(argv[2], (writing ? O_WRONLY : O_RDONLY) | O_DIRECT);

    if (fd < 0 || posix_memalign(&data, 4096, size))
        return 1;
    memset(data, 0x5a, size);
    places = lseek(fd, 0, SEEK_END) / size;
    srand(1);
    start = now();
    do {
        off_t at = (random ? rand() % places : count % places) * (off_t)size;

        if ((writing ? pwrite(fd, data, size, at) : pread(fd, data, size, at)) != (ssize_t)size)
            return 1;
        count++;
    } while ((spent = now() - start) < seconds);
    printf("%ld %.6f\n", count, spent);
    return 0;
}
