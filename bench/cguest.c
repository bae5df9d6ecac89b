/* Round trips of a guest over TCP: the host that answers, and the C parser as the client that asks.
 *
 *   cguest serve                          prints its port, serves one client after the other until it is killed
 *   cguest ask PORT SIZE DEPTH SECONDS    bulk IN transfers of SIZE bytes, DEPTH in flight: prints round trips per second, and the
 *                                         50th, the 99th percentile and the worst of their times in microseconds
 *
 * The host packs and unpacks by hand, reads and writes as much as there is at a time, and is the same for every client.
 * The client reads as usbredirect does: one read() for each request of the parser, poll() when there is nothing.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <usbredirparser.h>

#define BULK_PACKET 101
#define BUFFER (1 << 20)
#define MOST_FLYING 1024
#define MOST_TAKEN (1 << 22)

static int fd;
static long answered, asked;
static int size;
static uint64_t next_id = 1;
static struct usbredirparser *parser;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* ---------------------------------------------------------------- the host */

#pragma pack(push, 1)
struct packet {
    uint32_t type, length;
    uint64_t id;
};
struct packet32 {
    uint32_t type, length, id;
};
struct bulk {
    uint8_t endpoint, status;
    uint16_t length;
    uint32_t stream;
    uint16_t length_high;
};
struct hello {
    struct packet32 head;
    char version[64];
    uint32_t capabilities;
};
struct device_connect {
    struct packet head;
    uint8_t speed, class, subclass, protocol;
    uint16_t vendor, product, version;
};
#pragma pack(pop)

static void send_all(int to, const void *data, size_t length)
{
    const uint8_t *rest = data;

    while (length) {
        ssize_t n = send(to, rest, length, MSG_NOSIGNAL);
        if (n <= 0)
            return;
        rest += n;
        length -= n;
    }
}

static void greet(int to)
{
    struct hello hello = { { 0, sizeof(hello) - sizeof(hello.head), 0 }, "bench", 0xff };
    struct device_connect connect = { { 1, sizeof(connect) - sizeof(connect.head), 0 }, 2, 0, 0, 0, 0x1209, 1, 0 };

    send_all(to, &hello, sizeof(hello));
    send_all(to, &connect, sizeof(connect));
}

static void serve_one(int client)
{
    static uint8_t in[BUFFER], out[2 * BUFFER];
    size_t have = 0, skip = sizeof(struct hello);
    ssize_t n;

    greet(client);
    while ((n = recv(client, in + have, sizeof(in) - have, 0)) > 0) {
        size_t at = 0, filled = 0;

        have += n;
        if (skip) {
            size_t step = skip < have ? skip : have;
            at = step;
            skip -= step;
        }
        while (!skip && have - at >= sizeof(struct packet)) {
            struct packet *head = (struct packet *)(in + at);
            struct bulk *bulk = (struct bulk *)(head + 1);
            uint32_t wanted;

            if (have - at < sizeof(*head) + head->length)
                break;
            at += sizeof(*head) + head->length;
            if (head->type != BULK_PACKET)
                continue;
            wanted = bulk->length | (uint32_t)bulk->length_high << 16;
            if (filled + sizeof(*head) + sizeof(*bulk) + wanted > sizeof(out)) {
                send_all(client, out, filled);
                filled = 0;
            }
            memcpy(out + filled, head, sizeof(*head) + sizeof(*bulk));
            ((struct packet *)(out + filled))->length = sizeof(*bulk) + wanted;
            filled += sizeof(*head) + sizeof(*bulk) + wanted;
        }
        send_all(client, out, filled);
        memmove(in, in + at, have - at);
        have -= at;
    }
    close(client);
}

static void serve(void)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
    socklen_t length = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;

    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 8) < 0)
        fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int client = accept(listener, NULL, NULL);

        if (client < 0)
            fail("accept");
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        serve_one(client);
    }
}

/* ---------------------------------------------------------------- the client */

static int connected;
static double asked_at[MOST_FLYING]; /* answers come in the order of the requests */
static float taken[MOST_TAKEN];
static long count_taken = -1; /* below 0: not yet */

static void on_log(void *priv, int level, const char *message)
{
    if (level <= usbredirparser_warning)
        fprintf(stderr, "%s\n", message);
}

static int on_read(void *priv, uint8_t *data, int count)
{
    ssize_t n = read(fd, data, count);

    if (n > 0)
        return (int)n;
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

static int on_write(void *priv, uint8_t *data, int count)
{
    ssize_t n = write(fd, data, count);

    if (n >= 0)
        return (int)n;
    return errno == EAGAIN || errno == EINTR ? 0 : -1;
}

static void on_hello(void *priv, struct usb_redir_hello_header *hello)
{
}

static void on_connect(void *priv, struct usb_redir_device_connect_header *header)
{
    connected = 1;
}

static void ask_once(void)
{
    struct usb_redir_bulk_packet_header header = { .endpoint = 0x81, .length = size, .length_high = size >> 16 };

    asked_at[asked++ % MOST_FLYING] = now();
    usbredirparser_send_bulk_packet(parser, next_id++, &header, NULL, 0);
}

static void on_bulk(void *priv, uint64_t id, struct usb_redir_bulk_packet_header *header, uint8_t *data, int length)
{
    if (length != size || header->status != usb_redir_success)
        fail("answer");
    usbredirparser_free_packet_data(parser, data);
    if (count_taken >= 0 && count_taken < MOST_TAKEN)
        taken[count_taken++] = (now() - asked_at[answered % MOST_FLYING]) * 1e6;
    answered++;
    ask_once();
}

static void exchange(void)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    if (usbredirparser_do_write(parser) < 0)
        fail("write");
    if (usbredirparser_has_data_to_write(parser))
        p.events |= POLLOUT;
    poll(&p, 1, -1);
    if (usbredirparser_do_read(parser) < 0)
        fail("read");
}

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

static void print_results(double rate)
{
    if (!count_taken)
        fail("no answer");
    qsort(taken, count_taken, sizeof(*taken), compare);
    printf("%.1f %.2f %.2f %.2f\n", rate, taken[count_taken / 2], taken[count_taken * 99 / 100], taken[count_taken - 1]);
}

static int ask(int port, int depth, double seconds)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
    uint32_t capabilities = 0xff;
    double start, spent;
    long before;
    int one = 1;

    address.sin_port = htons(port);
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    fcntl(fd, F_SETFL, O_NONBLOCK);
    parser = usbredirparser_create();
    parser->log_func = on_log;
    parser->read_func = on_read;
    parser->write_func = on_write;
    parser->hello_func = on_hello;
    parser->device_connect_func = on_connect;
    parser->bulk_packet_func = on_bulk;
    usbredirparser_init(parser, "bench", &capabilities, 1, 0);
    while (!connected)
        exchange();
    for (int i = 0; i < depth; i++)
        ask_once();
    for (int i = 0; i < 200; i++)
        exchange();
    before = answered;
    count_taken = 0;
    start = now();
    do
        exchange();
    while ((spent = now() - start) < seconds);
    print_results((answered - before) / spent);
    return 0;
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    if (argc == 2 && !strcmp(argv[1], "serve"))
        serve();
    if (argc != 6 || strcmp(argv[1], "ask"))
        return 2;
    size = atoi(argv[3]);
    if (atoi(argv[4]) < 1 || atoi(argv[4]) > MOST_FLYING)
        return 2;
    return ask(atoi(argv[2]), atoi(argv[4]), atof(argv[5]));
}
