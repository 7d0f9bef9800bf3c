/* packet.h: IP packets as a TUN device with IFF_VNET_HDR hands them over and takes them, cut into what is on the line.
 *
 *     a frame:  | virtio_net_hdr 10 | IP header | TCP header | payload of 1 to 45 segments |
 *
 * The kernel's TCP leaves segmentation to the device, as it does with a real one. On the line there are packets of the
 * MTU at most: each is lost, delayed and counted by itself. Neighbours that arrive together go to the other kernel as
 * one frame again, as a real card's driver does (GRO). Pure: no descriptor, no allocation. */
#ifndef NETLAB_PACKET_H
#define NETLAB_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PACKET_VNET_SIZE = 10,
    PACKET_FRAME_MAX = PACKET_VNET_SIZE + 40 + 65535,
    PACKET_HEAD_MAX = PACKET_VNET_SIZE + 60 + 60,
    PACKET_ADDRESS_SIZE = 16,
};

typedef struct packet_shape {
    uint8_t from[PACKET_ADDRESS_SIZE], to[PACKET_ADDRESS_SIZE]; /* IPv6, or IPv4 as ::ffff:a.b.c.d */
    uint64_t flow;           /* of addresses and ports; 0: no TCP */
    uint32_t head_size;      /* virtio, IP and TCP header; where the kernel has not left segmentation to us: virtio alone */
    uint32_t payload_size;   /* behind the head */
    uint32_t segment_size;   /* payload of each segment but the last */
    uint32_t segments;       /* at least 1 */
} packet_shape;

/* False: no whole IP packet; nothing can be done with it. */
bool packet_parse(const uint8_t *frame, size_t size, packet_shape *shape);

/* Bytes of the IP packet that segment `i` is on the line. */
uint32_t packet_size(const packet_shape *shape, uint32_t i);

/* What to write so that segments first .. first+count-1 arrive: `head` (*head_size bytes), and payload_size bytes of the
 * frame's from *payload_at on. */
void packet_join(const uint8_t *frame, const packet_shape *shape, uint32_t first, uint32_t count,
                 uint8_t head[PACKET_HEAD_MAX], uint32_t *head_size, uint32_t *payload_at, uint32_t *payload_size);

#endif
