// SPDX-License-Identifier: Apache-2.0
//
// A container's first program: tells at once, as JSON, all that no two containers
// may have alike, and what its clocks say.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

static void print_hex(const char *name, const void *bytes, size_t length)
{
	printf("\"%s\": \"", name);
	for (size_t i = 0; i < length; i++)
		printf("%02x", ((const unsigned char *)bytes)[i]);
	printf("\", ");
}

static size_t read_file(const char *path, char *bytes, size_t size)
{
	int fd = open(path, O_RDONLY);
	ssize_t got = fd < 0 ? 0 : read(fd, bytes, size);

	if (fd >= 0)
		close(fd);
	return got > 0 ? got : 0;
}

static void print_file(const char *name, const char *path)
{
	char text[256] = "";

	read_file(path, text, sizeof(text) - 1);
	text[strcspn(text, "\n")] = 0;
	printf("\"%s\": \"%s\", ", name, text);
}

static void print_clock(const char *name, clockid_t clock, const char *end)
{
	struct timespec now;

	clock_gettime(clock, &now);
	printf("\"%s\": %lld%s", name, now.tv_sec * 1000000000LL + now.tv_nsec, end);
}

int main(void)
{
	char called[32] = "", device[32] = "", host[65] = "";

	if (getrandom(called, sizeof(called), 0) != sizeof(called) ||
	    read_file("/dev/urandom", device, sizeof(device)) != sizeof(device))
		return 1;
	gethostname(host, sizeof(host) - 1);
	printf("{ ");
	print_hex("getrandom", called, sizeof(called));
	print_hex("/dev/urandom", device, sizeof(device));
	// Stack canaries and the keys of hash tables are made of these.
	print_hex("AT_RANDOM", (const void *)getauxval(AT_RANDOM), 16);
	print_file("boot_id", "/proc/sys/kernel/random/boot_id");
	print_file("uuid", "/proc/sys/kernel/random/uuid");
	print_file("mac", "/sys/class/net/eth0/address");
	printf("\"hostname\": \"%s\", ", host);
	print_clock("realtime", CLOCK_REALTIME, ", ");
	print_clock("monotonic", CLOCK_MONOTONIC, " }\n");
	return 0;
}
