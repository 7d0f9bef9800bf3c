/* packet.c: see packet.h. Headers: RFC 791, RFC 8200, RFC 9293; linux/virtio_net.h. */
#include "packet.h"

#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <string.h>

enum {
    IP_TOTAL = 2, IP_ID = 4, IP_FRAGMENT = 6, IP_CARRIES = 9, IP_SUM = 10, IP_FROM = 12, IP_TO = 16, IP_HEAD_MIN = 20,
    IP6_PAYLOAD = 4, IP6_CARRIES = 6, IP6_FROM = 8, IP6_TO = 24, IP6_HEAD = 40,
    TCP_SEQUENCE = 4, TCP_OFFSET = 12, TCP_FLAGS = 13, TCP_SUM = 16, TCP_HEAD_MIN = 20,
    FLAG_FIN = 0x01, FLAG_PSH = 0x08, FLAG_CWR = 0x80,
};

static uint32_t get16(const uint8_t *at) { return (uint32_t)at[0] << 8 | at[1]; }

static uint32_t get32(const uint8_t *at) { return get16(at) << 16 | get16(at + 2); }

static void put16(uint8_t *at, uint32_t value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value) {
    put16(at, value >> 16);
    put16(at + 2, value);
}

static uint32_t fold16(uint32_t sum) {
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

/* The sum of RFC 1071, not inverted. */
static uint32_t sum16(const uint8_t *at, size_t size) {
    uint32_t sum = 0;
    for (size_t i = 0; i + 1 < size; i += 2) sum += get16(at + i);
    return fold16(sum);
}

static bool is_6(const uint8_t *ip) { return ip[0] >> 4 == 6; }

static void put_mapped(uint8_t *address, const uint8_t *ipv4) {
    memset(address, 0, 10);
    memset(address + 10, 0xff, 2);
    memcpy(address + 12, ipv4, 4);
}

/* The IP header's own fields. *carries: the protocol behind it; of a fragment none, since it has no ports of its own or is
 * followed by such that have none. An IPv6 extension header counts as a protocol that we don't know. */
static bool parse_ip(const uint8_t *ip, size_t size, packet_shape *shape, size_t *head, uint8_t *carries) {
    if (size >= IP6_HEAD && is_6(ip)) {
        *head = IP6_HEAD;
        *carries = ip[IP6_CARRIES];
        memcpy(shape->from, ip + IP6_FROM, PACKET_ADDRESS_SIZE);
        memcpy(shape->to, ip + IP6_TO, PACKET_ADDRESS_SIZE);
        return IP6_HEAD + get16(ip + IP6_PAYLOAD) == size;
    }
    if (ip[0] >> 4 != 4) return false;
    *head = (size_t)(ip[0] & 15) * 4;
    *carries = (get16(ip + IP_FRAGMENT) & 0x3fff) != 0 ? IPPROTO_NONE : ip[IP_CARRIES];
    put_mapped(shape->from, ip + IP_FROM);
    put_mapped(shape->to, ip + IP_TO);
    return *head >= IP_HEAD_MIN && *head <= size && get16(ip + IP_TOTAL) == size;
}

static uint64_t flow_of(const packet_shape *shape, uint32_t ports) {
    uint64_t key = ports * 0xd1b54a32d192ed03u, part;
    for (int i = 0; i < 2 * PACKET_ADDRESS_SIZE; i += 8) {
        memcpy(&part, (i < PACKET_ADDRESS_SIZE ? shape->from : shape->to) + i % PACKET_ADDRESS_SIZE, sizeof part);
        key = ((key << 23 | key >> 41) ^ part) * 0x9e3779b97f4a7c15u;
    }
    return key == 0 ? 1 : key;
}

bool packet_parse(const uint8_t *frame, size_t size, packet_shape *shape) {
    if (size < PACKET_VNET_SIZE + IP_HEAD_MIN || size > PACKET_FRAME_MAX) return false;
    struct virtio_net_hdr vnet;
    memcpy(&vnet, frame, sizeof vnet);
    const uint8_t *ip = frame + PACKET_VNET_SIZE;
    size_t ip_size = size - PACKET_VNET_SIZE, ip_head;
    uint8_t carries;
    *shape = (packet_shape){.head_size = PACKET_VNET_SIZE, .segments = 1};
    shape->payload_size = shape->segment_size = (uint32_t)ip_size;
    if (!parse_ip(ip, ip_size, shape, &ip_head, &carries)) return false;
    bool tcp = carries == IPPROTO_TCP && ip_size >= ip_head + TCP_HEAD_MIN;
    if (tcp) shape->flow = flow_of(shape, get32(ip + ip_head));
    if (vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE) return true;
    uint8_t offered = is_6(ip) ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4;
    if (vnet.gso_type != offered || !tcp || vnet.gso_size == 0) return false;
    size_t tcp_head = (size_t)(ip[ip_head + TCP_OFFSET] >> 4) * 4;
    if (tcp_head < TCP_HEAD_MIN || ip_head + tcp_head >= ip_size) return false;
    shape->head_size = (uint32_t)(PACKET_VNET_SIZE + ip_head + tcp_head);
    shape->payload_size = (uint32_t)(ip_size - ip_head - tcp_head);
    shape->segment_size = vnet.gso_size;
    shape->segments = (shape->payload_size + vnet.gso_size - 1u) / vnet.gso_size;
    return true;
}

static uint32_t payload_of(const packet_shape *shape, uint32_t first, uint32_t count) {
    uint32_t begin = first * shape->segment_size, end = begin + count * shape->segment_size;
    return (end < shape->payload_size ? end : shape->payload_size) - begin;
}

uint32_t packet_size(const packet_shape *shape, uint32_t i) {
    return shape->head_size - PACKET_VNET_SIZE + payload_of(shape, i, 1);
}

void packet_join(const uint8_t *frame, const packet_shape *shape, uint32_t first, uint32_t count,
                 uint8_t head[PACKET_HEAD_MAX], uint32_t *head_size, uint32_t *payload_at, uint32_t *payload_size) {
    *payload_size = payload_of(shape, first, count);
    *payload_at = shape->head_size + first * shape->segment_size;
    *head_size = shape->head_size;
    memcpy(head, frame, shape->head_size);
    if (first == 0 && count == shape->segments) return;

    uint8_t *ip = head + PACKET_VNET_SIZE;
    uint32_t ip_head = is_6(ip) ? IP6_HEAD : (ip[0] & 15u) * 4;
    uint8_t *tcp = ip + ip_head;
    uint32_t tcp_size = shape->head_size - PACKET_VNET_SIZE - ip_head + *payload_size;
    uint32_t addresses_sum;
    if (is_6(ip)) {
        put16(ip + IP6_PAYLOAD, tcp_size);
        addresses_sum = sum16(ip + IP6_FROM, 2 * PACKET_ADDRESS_SIZE);
    } else {
        put16(ip + IP_TOTAL, ip_head + tcp_size);
        put16(ip + IP_ID, get16(ip + IP_ID) + first);
        put16(ip + IP_SUM, 0);
        put16(ip + IP_SUM, ~sum16(ip, ip_head));
        addresses_sum = sum16(ip + IP_FROM, 8);
    }
    put32(tcp + TCP_SEQUENCE, get32(tcp + TCP_SEQUENCE) + first * shape->segment_size);
    if (first + count < shape->segments) tcp[TCP_FLAGS] &= (uint8_t) ~(FLAG_FIN | FLAG_PSH);
    if (first > 0) tcp[TCP_FLAGS] &= (uint8_t)~FLAG_CWR;
    /* The device is asked to finish the checksum: it holds the pseudo-header's sum, and the receiving kernel is content. */
    put16(tcp + TCP_SUM, fold16(addresses_sum + IPPROTO_TCP + tcp_size));

    struct virtio_net_hdr vnet = {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
        .gso_type = count == 1 ? VIRTIO_NET_HDR_GSO_NONE
                    : is_6(ip) ? VIRTIO_NET_HDR_GSO_TCPV6
                               : VIRTIO_NET_HDR_GSO_TCPV4,
        .hdr_len = (uint16_t)(shape->head_size - PACKET_VNET_SIZE),
        .gso_size = count > 1 ? (uint16_t)shape->segment_size : 0,
        .csum_start = (uint16_t)ip_head,
        .csum_offset = TCP_SUM,
    };
    memcpy(head, &vnet, sizeof vnet);
}
