# Every package that our modules name, by its attribute in nixpkgs 26.05, with the programs in
# its bin/, checked by hand against nixpkgs. What is not here does not exist for the evaluation,
# and a program that stands in no such list is found by the check of all commands.
{
  bash = [
    "bash"
    "sh"
  ];
  # pkgs/by-name/cn/cni-plugins
  cni-plugins = [
    "bandwidth"
    "bridge"
    "dhcp"
    "dummy"
    "firewall"
    "host-device"
    "host-local"
    "ipvlan"
    "loopback"
    "macvlan"
    "portmap"
    "ptp"
    "sbr"
    "static"
    "tap"
    "tuning"
    "vlan"
    "vrf"
  ];
  # pkgs/by-name/co/containerd
  containerd = [
    "containerd"
    "containerd-shim-runc-v2"
    "containerd-stress"
    "ctr"
  ];
  coreutils = [
    "cat"
    "chmod"
    "chown"
    "cp"
    "date"
    "install"
    "ln"
    "mkdir"
    "mv"
    "rm"
    "sleep"
  ];
  # pkgs/by-name/cr/cri-tools
  cri-tools = [ "crictl" ];
  curl = [ "curl" ];
  # pkgs/by-name/et/etcd_3_6: server and both tools in one
  etcd_3_6 = [
    "etcd"
    "etcdctl"
    "etcdutl"
  ];
  findutils = [
    "find"
    "xargs"
  ];
  gnugrep = [ "grep" ];
  gnused = [ "sed" ];
  iptables = [
    "ip6tables"
    "ip6tables-restore"
    "ip6tables-save"
    "iptables"
    "iptables-restore"
    "iptables-save"
  ];
  jq = [ "jq" ];
  kmod = [
    "depmod"
    "insmod"
    "lsmod"
    "modinfo"
    "modprobe"
    "rmmod"
  ];
  # pkgs/by-name/ku/kubectl: not in kubernetes, which has the servers and kubeadm
  kubectl = [ "kubectl" ];
  kubernetes = [
    "kube-addons"
    "kube-apiserver"
    "kube-controller-manager"
    "kube-proxy"
    "kube-scheduler"
    "kubeadm"
    "kubelet"
  ];
  nftables = [ "nft" ];
  openssh = [
    "scp"
    "ssh"
    "ssh-keygen"
    "sshd"
  ];
  rsync = [
    "rsync"
    "rsync-ssl"
  ];
  runc = [ "runc" ];
  systemd = [
    "journalctl"
    "networkctl"
    "systemctl"
    "systemd-notify"
    "systemd-tmpfiles"
  ];
  util-linux = [
    "findmnt"
    "losetup"
    "mount"
    "nsenter"
    "umount"
    "unshare"
  ];
}
