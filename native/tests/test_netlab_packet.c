/* test_netlab_packet.c: frames of a TUN device are cut into packets and joined again without a byte changed. */
#include "packet.h"

#include <linux/virtio_net.h>

#include "test.h"

enum { HEAD = PACKET_VNET_SIZE + 20 + 32, SEGMENT = 1448, COUNT = 5, LAST = 77, PAYLOAD = (COUNT - 1) * SEGMENT + LAST };
enum { FLAGS = PACKET_VNET_SIZE + 20 + 13 };

static uint32_t read16(const uint8_t *at) { return (uint32_t)at[0] << 8 | at[1]; }

static uint32_t read32(const uint8_t *at) { return read16(at) << 16 | read16(at + 2); }

static uint32_t ones(const uint8_t *at, size_t size, uint32_t sum) {
    for (size_t i = 0; i + 1 < size; i += 2) sum += read16(at + i);
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

/* A frame as the kernel makes it: FIN, PSH and ACK set, a header of 32 bytes, COUNT segments. */
static size_t make_frame(uint8_t *frame, uint8_t gso_type) {
    memset(frame, 0, HEAD);
    struct virtio_net_hdr vnet = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = gso_type, .hdr_len = HEAD - PACKET_VNET_SIZE,
                                  .gso_size = gso_type == VIRTIO_NET_HDR_GSO_NONE ? 0 : SEGMENT, .csum_start = 20, .csum_offset = 16};
    memcpy(frame, &vnet, sizeof vnet);
    uint8_t *ip = frame + PACKET_VNET_SIZE, *tcp = ip + 20;
    const uint8_t addresses[8] = {10, 78, 0, 1, 10, 78, 0, 2};
    ip[0] = 0x45;
    ip[2] = (20 + 32 + PAYLOAD) >> 8;
    ip[3] = (20 + 32 + PAYLOAD) & 255;
    ip[4] = 0xff, ip[5] = 0xfe; /* the id wraps at the third */
    ip[8] = 64, ip[9] = 6;
    memcpy(ip + 12, addresses, 8);
    tcp[0] = 0x1b, tcp[1] = 0x58, tcp[2] = 0x80, tcp[3] = 0x01;
    memset(tcp + 4, 0xff, 4); /* the sequence number wraps too */
    tcp[12] = 8 << 4;
    tcp[13] = 0x80 | 0x10 | 0x08 | 0x01;
    for (int i = 0; i < PAYLOAD; i++) frame[HEAD + i] = (uint8_t)(i * 31);
    return HEAD + PAYLOAD;
}

static uint8_t frame[PACKET_FRAME_MAX];

TEST(parse_cuts_a_frame_into_packets_of_the_line) {
    packet_shape shape;
    REQUIRE(packet_parse(frame, make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4), &shape));
    CHECK_EQ(shape.segments, COUNT);
    CHECK(memcmp(shape.from, (uint8_t[16]){[10] = 0xff, 0xff, 10, 78, 0, 1}, 16) == 0);
    CHECK(memcmp(shape.to, (uint8_t[16]){[10] = 0xff, 0xff, 10, 78, 0, 2}, 16) == 0);
    CHECK(shape.flow != 0);
    for (uint32_t i = 0; i < COUNT; i++) CHECK_EQ(packet_size(&shape, i), 52 + (i < COUNT - 1 ? SEGMENT : LAST));
}

static void check_part(uint32_t first, uint32_t count) {
    packet_shape shape;
    uint8_t head[PACKET_HEAD_MAX];
    uint32_t head_size, payload_at, payload_size;
    REQUIRE(packet_parse(frame, make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4), &shape));
    packet_join(frame, &shape, first, count, head, &head_size, &payload_at, &payload_size);
    bool whole = first == 0 && count == COUNT, with_last = first + count == COUNT;
    uint32_t want = with_last ? (count - 1) * SEGMENT + LAST : count * SEGMENT;
    uint8_t *ip = head + PACKET_VNET_SIZE, *tcp = ip + 20;
    CHECK_EQ(head_size, HEAD);
    CHECK_EQ(payload_size, want);
    CHECK_EQ(payload_at, HEAD + first * SEGMENT);
    CHECK_EQ(read16(ip + 2), 52 + want);
    CHECK_EQ(read16(ip + 4), (0xfffe + first) & 0xffff);
    CHECK_EQ(read32(tcp + 4), 0xffffffff + first * SEGMENT);
    CHECK_EQ(head[FLAGS], 0x10 | (with_last ? 0x09 : 0) | (first == 0 ? 0x80 : 0));
    struct virtio_net_hdr vnet;
    memcpy(&vnet, head, sizeof vnet);
    CHECK_EQ(vnet.gso_type, count > 1 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_NONE);
    CHECK_EQ(vnet.gso_size, count > 1 ? SEGMENT : 0);
    CHECK_EQ(vnet.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
    if (whole) return; /* as it came */
    CHECK_EQ(ones(ip, 20, 0), 0xffff);
    CHECK_EQ(read16(tcp + 16), ones(ip + 12, 8, 6 + 32 + want));
}

TEST(join_makes_a_valid_frame_of_any_neighbours) {
    for (uint32_t first = 0; first < COUNT; first++)
        for (uint32_t count = 1; first + count <= COUNT; count++) check_part(first, count);
}

TEST(a_frame_of_one_packet_goes_through_as_it_is) {
    packet_shape shape;
    uint8_t head[PACKET_HEAD_MAX];
    uint32_t head_size, payload_at, payload_size;
    size_t size = make_frame(frame, VIRTIO_NET_HDR_GSO_NONE);
    REQUIRE(packet_parse(frame, size, &shape));
    CHECK_EQ(shape.segments, 1);
    CHECK_EQ(packet_size(&shape, 0), size - PACKET_VNET_SIZE);
    packet_join(frame, &shape, 0, 1, head, &head_size, &payload_at, &payload_size);
    CHECK_EQ(payload_at, head_size);
    CHECK_EQ(head_size + payload_size, size);
    CHECK(memcmp(head, frame, head_size) == 0);
}

TEST(parse_refuses_what_is_not_a_whole_ip_packet) {
    packet_shape shape;
    size_t size = make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4);
    for (size_t shorter = 0; shorter < size; shorter++) CHECK(!packet_parse(frame, shorter, &shape));
    frame[PACKET_VNET_SIZE] = 0x65; /* IPv6 of another length */
    CHECK(!packet_parse(frame, size, &shape));
    frame[PACKET_VNET_SIZE] = 0x44; /* a header of 16 bytes */
    CHECK(!packet_parse(frame, size, &shape));
    make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4);
    frame[PACKET_VNET_SIZE + 20 + 12] = 0xf0; /* reaches into the payload, but is inside */
    CHECK(packet_parse(frame, size, &shape));
    frame[PACKET_VNET_SIZE + 20 + 12] = 0x40; /* too short for TCP */
    CHECK(!packet_parse(frame, size, &shape));
    make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4);
    memset(frame + 4, 0, 2); /* segments of nothing */
    CHECK(!packet_parse(frame, size, &shape));
    make_frame(frame, VIRTIO_NET_HDR_GSO_UDP); /* we do not offer it */
    CHECK(!packet_parse(frame, size, &shape));
}

TEST(flows_differ_by_ports_addresses_and_direction) {
    packet_shape shape;
    size_t size = make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4);
    REQUIRE(packet_parse(frame, size, &shape));
    uint64_t flow = shape.flow;
    const int offsets[] = {15, 19, 21, 23};
    for (int i = 0; i < 4; i++) {
        make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4);
        frame[PACKET_VNET_SIZE + offsets[i]]++;
        REQUIRE(packet_parse(frame, size, &shape));
        CHECK(shape.flow != flow);
    }
    make_frame(frame, VIRTIO_NET_HDR_GSO_NONE);
    frame[PACKET_VNET_SIZE + 9] = 17; /* UDP is not capped */
    REQUIRE(packet_parse(frame, size, &shape));
    CHECK_EQ(shape.flow, 0);
}

/* ---- IPv6 */

enum { HEAD6 = PACKET_VNET_SIZE + 40 + 32 };

/* The same TCP segments behind an IPv6 header. */
static size_t make_frame6(void) {
    uint8_t tcp[32 + PAYLOAD];
    make_frame(frame, VIRTIO_NET_HDR_GSO_TCPV4);
    memcpy(tcp, frame + HEAD - 32, sizeof tcp);
    struct virtio_net_hdr vnet = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV6,
                                  .hdr_len = HEAD6 - PACKET_VNET_SIZE, .gso_size = SEGMENT, .csum_start = 40, .csum_offset = 16};
    memcpy(frame, &vnet, sizeof vnet);
    uint8_t *ip = frame + PACKET_VNET_SIZE;
    memset(ip, 0, 40);
    ip[0] = 0x60;
    ip[4] = (32 + PAYLOAD) >> 8;
    ip[5] = (32 + PAYLOAD) & 255;
    ip[6] = 6, ip[7] = 64;
    for (int i = 0; i < 32; i++) ip[8 + i] = (uint8_t)(0x20 + i);
    memcpy(ip + 40, tcp, sizeof tcp);
    return HEAD6 + PAYLOAD;
}

TEST(segments_over_ipv6_are_cut_and_joined_as_well) {
    packet_shape shape;
    uint8_t head[PACKET_HEAD_MAX];
    uint32_t head_size, payload_at, payload_size;
    REQUIRE(packet_parse(frame, make_frame6(), &shape));
    CHECK_EQ(shape.segments, COUNT);
    CHECK(shape.flow != 0);
    CHECK(memcmp(shape.from, frame + PACKET_VNET_SIZE + 8, 16) == 0);
    CHECK(memcmp(shape.to, frame + PACKET_VNET_SIZE + 24, 16) == 0);
    for (uint32_t i = 0; i < COUNT; i++) CHECK_EQ(packet_size(&shape, i), 72 + (i < COUNT - 1 ? SEGMENT : LAST));
    for (uint32_t first = 0; first < COUNT; first++)
        for (uint32_t count = 1; first + count <= COUNT; count++) {
            packet_join(frame, &shape, first, count, head, &head_size, &payload_at, &payload_size);
            bool whole = first == 0 && count == COUNT;
            uint32_t want = first + count == COUNT ? (count - 1) * SEGMENT + LAST : count * SEGMENT;
            uint8_t *ip = head + PACKET_VNET_SIZE, *tcp = ip + 40;
            struct virtio_net_hdr vnet;
            memcpy(&vnet, head, sizeof vnet);
            CHECK_EQ(vnet.gso_type, count > 1 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_NONE);
            CHECK_EQ(head_size, HEAD6);
            CHECK_EQ(payload_size, want);
            CHECK_EQ(payload_at, HEAD6 + first * SEGMENT);
            CHECK_EQ(read16(ip + 4), 32 + want);
            CHECK_EQ(read32(tcp + 4), 0xffffffff + first * SEGMENT);
            if (!whole) CHECK_EQ(read16(tcp + 16), ones(ip + 8, 32, 6 + 32 + want));
        }
}

TEST(parse_refuses_what_is_not_a_whole_ipv6_packet) {
    packet_shape shape;
    size_t size = make_frame6();
    for (size_t shorter = 0; shorter < size; shorter++) CHECK(!packet_parse(frame, shorter, &shape));
    frame[PACKET_VNET_SIZE + 6] = 44; /* a fragment can't be cut */
    CHECK(!packet_parse(frame, size, &shape));
    make_frame6();
    struct virtio_net_hdr vnet;
    memcpy(&vnet, frame, sizeof vnet);
    vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4; /* another protocol's segmentation */
    memcpy(frame, &vnet, sizeof vnet);
    CHECK(!packet_parse(frame, size, &shape));
}
