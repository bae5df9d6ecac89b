/* The C parser as a receiver over TCP, reading as usbredirect does: one read() for each request of the parser, poll()
 * when there is nothing. Prints the seconds from the start byte to the last packet.
 *
 *   cpeer PORT KIND COUNT       talks to bench/peer.py, role "give"
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <usbredirparser.h>

static int fd;
static long left;
static int connected;
static struct usbredirparser *parser;

static void on_log(void *priv, int level, const char *message)
{
    if (level <= usbredirparser_warning)
        fprintf(stderr, "%s\n", message);
}

static int on_read(void *priv, uint8_t *data, int count)
{
    ssize_t r = read(fd, data, count);

    if (r > 0)
        return (int)r;
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    return -1;
}

static int on_write(void *priv, uint8_t *data, int count)
{
    return count;
}

static void on_hello(void *priv, struct usb_redir_hello_header *hello)
{
    connected = 1;
}

static void received(uint8_t *data)
{
    usbredirparser_free_packet_data(parser, data);
    left--;
}

static void on_bulk(void *priv, uint64_t id, struct usb_redir_bulk_packet_header *h, uint8_t *data, int len)
{
    received(data);
}

static void on_interrupt(void *priv, uint64_t id, struct usb_redir_interrupt_packet_header *h, uint8_t *data, int len)
{
    received(data);
}

static void on_control(void *priv, uint64_t id, struct usb_redir_control_packet_header *h, uint8_t *data, int len)
{
    received(data);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void receive(void)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    poll(&p, 1, -1);
    if (usbredirparser_do_read(parser) < 0 && left) {
        fprintf(stderr, "read error, %ld packets left\n", left);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = { .sin_family = AF_INET };
    uint32_t capabilities = 0xff;
    char command[64];
    int one = 1;
    double start;

    if (argc != 4)
        return 2;
    left = atol(argv[3]);
    address.sin_port = htons(atoi(argv[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        perror("connect");
        return 1;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    snprintf(command, sizeof(command), "give %d %ld\n", atoi(argv[2]), left);
    if (write(fd, command, strlen(command)) < 0)
        return 1;
    fcntl(fd, F_SETFL, O_NONBLOCK);

    parser = usbredirparser_create();
    parser->log_func = on_log;
    parser->read_func = on_read;
    parser->write_func = on_write;
    parser->hello_func = on_hello;
    parser->bulk_packet_func = on_bulk;
    parser->interrupt_packet_func = on_interrupt;
    parser->control_packet_func = on_control;
    usbredirparser_init(parser, "bench", &capabilities, 1, usbredirparser_fl_no_hello);
    while (!connected)
        receive();

    start = now();
    if (write(fd, "!", 1) != 1)
        return 1;
    while (left)
        receive();
    printf("%.9f\n", now() - start);
    usbredirparser_destroy(parser);
    return 0;
}
